"""What packages import of the engine is documented, and what is documented is there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import blockstream
from blockstream import plugins
from blockstream.cli.plugin_templates import KINDS, files_of
from tests.support.imports import ROOT, imports

ROW = re.compile(r"^\| `(blockstream[\w.]*)` \| (.*?) \|", re.M)


def table() -> dict[str, set[str]]:
    """Return the names of docs/api.md by module."""
    found: dict[str, set[str]] = {}
    for module, names in ROW.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        assert module not in found, f"{module} has two rows"
        found[module] = set(re.findall(r"`(\w+)`", names))
    return found


TABLE = table()
PUBLIC = {
    "blockstream",
    *(f"blockstream.{name}" for name in blockstream.__all__),
    *(f"blockstream.plugins.{name}" for name in plugins.__all__),
    *(f"{module}.{name}" for module, names in TABLE.items() for name in names),
}
#: What stands on the engine: a folder, and the one its names start from.
PACKAGES = {
    **dict.fromkeys(("movd", "movd_coreml", "examples"), ROOT),
    **{p.name: ROOT / "plugins" for p in sorted((ROOT / "plugins").glob("blockstream_*"))},
}


def imported(path: Path, base: Path, source: str | None = None) -> set[str]:
    names = {name for _, name in imports(path, source, base, types=True)}
    return {name for name in names if name.partition(".")[0] == "blockstream"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_public_names_alone(package):
    base = PACKAGES[package]
    paths = sorted((base / package).rglob("*.py"))
    hidden = {f"{path.relative_to(ROOT)}: {name}" for path in paths for name in imported(path, base) - PUBLIC}
    assert paths and not hidden, "document it in docs/api.md, or do without"


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_package_imports_public_names_alone(kind):
    for name, text in files_of("leaps", kind).items():
        if name.endswith(".py"):
            assert not imported(ROOT / "x" / "y.py", ROOT, text) - PUBLIC, name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_code_of_a_page_imports_public_names_alone(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        hidden = imported(ROOT / "x" / "y.py", ROOT, block) - PUBLIC
        assert not hidden, f"{page.name}: document it in docs/api.md, or do without"


@pytest.mark.parametrize("module", TABLE)
def test_what_is_documented_is_there_and_says_what_it_is(module):
    found = importlib.import_module(module)
    for name in TABLE[module]:
        value = getattr(found, name, None) or importlib.import_module(f"{module}.{name}")
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_an_import_that_is_not_documented_would_be_seen():
    source = "def f():\n    from blockstream.engine.engine import Engine\n"
    assert imported(ROOT / "x.py", ROOT, source) - PUBLIC == {"blockstream.engine.engine.Engine"}
