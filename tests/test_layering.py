"""Who may import whom, whose names are whose, and what a room says of itself.

A BROKEN list names what does not hold yet. It only shrinks: an entry that is no longer needed fails its test.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.support.imports import ROOT, circles, dotted, foreign_privates, graph, imports, parsed

ENGINE = sorted((ROOT / "blockstream").rglob("*.py"))
ROOMS = sorted({p.parent for p in ENGINE} - {ROOT / "blockstream"})
#: The only rooms that import torch.
TORCH = [ROOT / "blockstream" / room for room in ("module", "device", "streaming", "verify")]
OUTSIDE_ADAPTER = [p for p in ENGINE if not any(room in p.parents for room in TORCH)]
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
PACKAGES = {p.name for p in (ROOT / "plugins").glob("blockstream_*")}
TESTS = sorted((ROOT / "tests").rglob("*.py"))
#: Folder of each top package, by name.
TOPS = {
    **dict.fromkeys(("blockstream", "movd", "movd_coreml", "benchmarks", "examples", "tests"), ROOT),
    **dict.fromkeys(PACKAGES, ROOT / "plugins"),
}
PRODUCT = sorted(p for top, base in TOPS.items() if top != "tests" for p in (base / top).rglob("*.py"))

#: Private names of the product, by the test that uses them.
BROKEN_PRIVATE_IN_TESTS: dict[str, set[str]] = {
    "tests/device/test_upload.py": {"_store"},
    "tests/engine/test_adopt_arena.py": {"_scheduler"},
    "tests/engine/test_engine.py": {"_condition", "_loader", "_scheduler"},
    "tests/engine/test_engine_failures.py": {"_condition", "_loader", "_scheduler", "_thread"},
    "tests/engine/test_overlap.py": {"_condition"},
    "tests/movd_coreml/test_backend.py": {"_tier"},
    "tests/streaming/test_budget.py": {"_condition", "_scheduler", "_stages", "_tier"},
    "tests/streaming/test_session.py": {"_tier"},
    "tests/support/interleaving.py": {"_condition", "_loader", "_thread"},
    "tests/support/towers.py": {"_in_use", "_scheduler"},
    "tests/verify/test_sessions.py": {"_is_loaded", "_residents"},
}
#: Files of more than 400 lines.
BROKEN_SIZES: set[str] = {
    "blockstream/plan/scheduler.py",
}
#: Names that several files of the engine have.
BROKEN_FILE_NAMES: set[str] = set()
#: Names that begin with an underscore in libraries as well, and are theirs to document.
LIBRARIES = {"_replace", "_buffers", "_modules", "_parameters", "_from_config"}


def importing(paths, forbidden, base=ROOT, **options):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path, base=base, **options)
        if forbidden(name.split("."))
    ]


def test_imports_are_found_wherever_they_stand():
    source = """
import torch.nn as nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import movd
else:
    import hidden
def f():
    from ..streaming import stream
    from . import plan
"""
    path = ROOT / "blockstream" / "cli" / "x.py"
    found = {name for _, name in imports(path, source)}
    assert found == {
        "torch.nn",
        "typing.TYPE_CHECKING",
        "hidden",
        "blockstream.streaming.stream",
        "blockstream.cli.plan",
    }
    assert {name for _, name in imports(path, source, types=True)} == found | {"movd"}


def written(tmp_path, **sources):
    """Write one package `p` of these files; return its files and folders by dotted name."""
    package = tmp_path / "p"
    package.mkdir()
    paths = {}
    for name, source in sources.items():
        paths[f"p.{name}"] = package / f"{name}.py"
        paths[f"p.{name}"].write_text(source)
    return paths, dict.fromkeys(paths, tmp_path)


def test_a_circle_is_found_also_through_functions_and_types(tmp_path):
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import C\n"
    files, bases = written(
        tmp_path, a="from .b import B", b=typed, c="def f():\n    from p import a\n", d="from . import a, c"
    )
    assert circles(graph(files, bases)) == [["p.a", "p.b", "p.c"]]


def test_a_private_name_of_another_file_is_found_however_it_is_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.support.imports.ROOT", tmp_path)
    files, _ = written(
        tmp_path,
        home="_name = 1\nclass A:\n    def __init__(self):\n        self._x = 1\n        self._mine = 2\n",
        imported="from .home import _name",
        read="def f(a):\n    return a._x",
        patched="monkeypatch.setattr(a, '_mine', 1)\nmonkeypatch.setattr('p.home._name', 1)",
        own="class B:\n    def f(self, b):\n        self._x = 1\n        return b._x",
    )
    found = foreign_privates(files.values(), files.values())
    assert found == {
        "p/imported.py": ["_name"],
        "p/read.py": ["_x"],
        "p/patched.py": ["_mine", "_name"],
    }


def test_the_engine_imports_neither_movd_nor_a_plugin():
    assert len(ENGINE) > 30
    found = importing(
        ENGINE, lambda name: name[0].startswith("movd") or name[0].startswith("blockstream_"), types=True
    )
    assert not found


def test_nothing_outside_the_adapter_imports_torch():
    heavy = {"torch", "transformers", "diffusers", "accelerate"}
    assert not importing(OUTSIDE_ADAPTER, lambda name: name[0] in heavy)


def test_the_core_imports_nothing_above_it():
    """The scheduler and what it stands on: no thread, no file, no clock, no room but its own."""
    paths = sorted((ROOT / "blockstream" / "plan").glob("*.py"))
    assert len(paths) > 8
    impure = {"threading", "time", "os", "io", "pathlib", "mmap", "random", "asyncio", "subprocess"}
    assert not importing(paths, lambda name: name[0] in impure)
    own = {"plan", "errors"}
    assert not importing(paths, lambda name: name[0] == "blockstream" and name[1] not in own)


def test_plugins_import_the_engine_alone():
    def forbidden(name):
        return name[0] in {"movd", "movd_coreml", "examples", "tests", "benchmarks"}

    assert not importing(PLUGINS, forbidden)
    for path in PLUGINS:
        mine = next(part for part in path.relative_to(ROOT).parts if part.startswith("blockstream_"))
        others = PACKAGES - {mine}
        assert not importing([path], lambda name, others=others: name[0] in others)


def test_movd_knows_nothing_of_the_packages_that_stand_on_it():
    assert not importing(
        sorted((ROOT / "movd").rglob("*.py")),
        lambda name: name[0] == "movd_coreml" or name[0] in {"tests", "benchmarks"},
        types=True,
    )


def test_no_files_import_each_other_in_a_circle():
    files, bases = {}, {}
    for top, base in TOPS.items():
        for path in sorted((base / top).rglob("*.py")):
            files[dotted(path, base)], bases[dotted(path, base)] = path, base
    found = circles(graph(files, bases))
    assert not found, "files that reach each other by imports, function-level and type-only ones included"


def assert_only_known(found, broken):
    """Assert that files use no private names but those of the list, and that all of the list are used."""
    used = {(file, name) for file, names in found.items() for name in names if name not in LIBRARIES}
    known = {(file, name) for file, names in broken.items() for name in names}
    assert not used - known, "private names of other files: make them public, or leave them alone"
    assert not known - used, "these are used no more: take them from the list"


def test_no_file_uses_another_ones_private_names():
    assert_only_known(foreign_privates(PRODUCT, PRODUCT), {})


def test_tests_use_no_private_names_of_the_product():
    assert_only_known(foreign_privates(TESTS, PRODUCT), BROKEN_PRIVATE_IN_TESTS)


def test_tests_share_through_support_alone():
    for path in TESTS:
        relative = [n.lineno for n in ast.walk(parsed(path)) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, f"{path.relative_to(ROOT)}:{relative} imports relatively"
    assert not importing(TESTS, lambda name: name[0] == "tests" and name[1] != "support")


def test_no_two_files_of_the_engine_have_one_name():
    count = Counter(path.name for path in ENGINE if path.name != "__init__.py")
    assert {name for name, times in count.items() if times > 1} == BROKEN_FILE_NAMES


def test_no_file_is_longer_than_400_lines():
    long = {str(p.relative_to(ROOT)) for p in PRODUCT if len(p.read_text().splitlines()) > 400}
    assert long == BROKEN_SIZES


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_says_what_comes_in_and_what_goes_out(room):
    said = " ".join((ast.get_docstring(parsed(room / "__init__.py")) or "").split())
    assert re.search(r"[.] In: .+; out: .+[.]", said), f"{room.name} does not say 'In: ...; out: ...'"


BLOCKED = """
import importlib, sys
for name in ("torch", "transformers", "diffusers", "movd"):
    sys.modules[name] = None  # importing it raises
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_module_outside_the_adapter_can_be_imported_without_torch():
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in OUTSIDE_ADAPTER
        if p.name != "__main__.py"
    ]
    assert len(names) > 25
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_blocking_torch_would_be_noticed():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "blockstream.streaming.stream"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "torch" in done.stderr
