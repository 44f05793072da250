"""What the files of a tree import and which private names they define and use, read without running them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path, base: Path = ROOT) -> str:
    """Return the name a file is imported by; `base` is the folder of its top package."""
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(
    path: Path, source: str | None = None, base: Path = ROOT, *, types: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of what a file imports when it runs, functions' imports included.

    With `types`, what is imported for the type checker alone as well.
    """
    tree = parsed(path) if source is None else ast.parse(source)
    package = list(path.relative_to(base).with_suffix("").parts[:-1])
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and is_type_checking(node.test) and not types:
            todo.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        else:
            todo.extend(ast.iter_child_nodes(node))


def graph(files: dict[str, Path], bases: dict[str, Path]) -> dict[str, set[str]]:
    """Return which of the files, by dotted name, each one imports."""
    edges: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for _, wanted in imports(path, base=bases[name], types=True):
            found = wanted if wanted in files else wanted.rpartition(".")[0]
            if found in files and found != name:
                edges[name].add(found)
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of files each of which reaches all the others, sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in edges:
        if name not in index:
            visit(name)
    return sorted(found)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def private_definitions(path: Path) -> set[str]:
    """Return the private names that a file defines: of functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each private name that a file imports or reads off an object."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            said = [
                a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            yield from ((node.lineno, name) for n in said if is_private(name := n.rpartition(".")[2]))


def foreign_privates(paths: Iterable[Path], own: Iterable[Path]) -> dict[str, list[str]]:
    """Return, for each of `paths`, the private names it uses that only other files of `own` define."""
    homes = defaultdict(set)
    for path in own:
        for name in private_definitions(path):
            homes[name].add(path)
    found: dict[str, list[str]] = {}
    for path in paths:
        mine = private_definitions(path)
        used = sorted({name for _, name in private_uses(path) if homes[name] and name not in mine})
        if used:
            found[str(path.relative_to(ROOT))] = used
    return found
