"""Who may import whom: the engine stands alone, and computes nothing with torch outside its adapter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "blockstream").rglob("*.py"))
#: The only rooms that import torch.
TORCH = [ROOT / "blockstream" / room for room in ("module", "device", "streaming", "verify")]
OUTSIDE_ADAPTER = [p for p in ENGINE if not any(room in p.parents for room in TORCH)]
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
PACKAGES = {p.name for p in (ROOT / "plugins").glob("blockstream_*")}


def is_type_checking(test):
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(path, source=None):
    """Yield (line, dotted name) of what a file imports when it runs, functions' imports included."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and is_type_checking(node.test):
            todo.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        else:
            todo.extend(ast.iter_child_nodes(node))


def importing(paths, forbidden):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path)
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
    found = {name for _, name in imports(ROOT / "blockstream" / "cli" / "x.py", source)}
    assert found == {
        "torch.nn",
        "typing.TYPE_CHECKING",
        "hidden",
        "blockstream.streaming.stream",
        "blockstream.cli.plan",
    }


def test_the_engine_imports_neither_movd_nor_a_plugin():
    assert len(ENGINE) > 30
    found = importing(ENGINE, lambda name: name[0] == "movd" or name[0].startswith("blockstream_"))
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
        return name[0] in {"movd", "examples", "tests", "benchmarks"}

    assert not importing(PLUGINS, forbidden)
    for path in PLUGINS:
        mine = next(part for part in path.relative_to(ROOT).parts if part.startswith("blockstream_"))
        others = PACKAGES - {mine}
        assert not importing([path], lambda name, others=others: name[0] in others)


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
