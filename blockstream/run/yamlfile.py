"""YAML read safely, with the line of every value, and written so that it reads back the same.

Scalars follow YAML 1.2's core schema: `16:9` and `no` are text, `1e-3` is a number. Refused are
duplicate keys, tags, files over a megabyte and aliases that expand beyond a few.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blockstream.errors import ConfigError
from blockstream.system import regular

MAX_NBYTES = 1 << 20
MAX_DEPTH = 32

#: Characters and 16 for each value, aliases expanded: what a document may grow to.
MAX_EXPANDED = 4 << 20

Keys = tuple[str | int, ...]


def dotted(path: Keys) -> str:
    """Return a path as people write it: `attention.0.ratio`."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class Document:
    """One YAML mapping: its name for messages, its data, and where each value was written.

    `base` is the folder relative paths start from. `marks` maps the path of a value to its line or
    to the `--set` that gave it. `packaged` names the distribution of a packaged example.
    """

    name: str
    data: dict[str, Any]
    base: Path = field(default_factory=Path.cwd)
    marks: Mapping[Keys, int | str] = field(default_factory=dict)
    packaged: str | None = None

    def mark(self, path: Keys) -> int | str | None:
        """Return where a value was written, or what holds it: a line, a `--set`, None if unknown."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return None


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2's core schema does; builds nothing itself."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text; never writes an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read(path: Path, name: str | None = None) -> Document:
    """Return the document in a file. Raises ConfigError, with lines, for all that is wrong."""
    name = name or str(path)
    try:
        raw = regular.read_bytes(path, MAX_NBYTES)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from error
    return parse(raw, name, path.absolute().parent)


def parse(text: bytes | str, name: str, base: Path | None = None) -> Document:
    """Return the document in a text; raises ConfigError for one that is no mapping."""
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > MAX_NBYTES:
        raise ConfigError(f"{name} is larger than {MAX_NBYTES} bytes, the most a config may have")
    try:
        builder = _Builder(name)
        data = builder.build(yaml.compose(raw.decode("utf-8-sig"), _Loader))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is nested deeper than {MAX_DEPTH} levels") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping of keys to values, got {_brief(data)}")
    return Document(name, data, base or Path.cwd(), builder.marks)


def with_set(document: Document, text: str) -> Document:
    """Return the document with one `a.b=value` applied; the value is YAML, a number indexes a list.

    Setting an option of a choice written as a bare name keeps the name: `sampler.tau=0.1` makes
    `{name: lpl, tau: 0.1}` of `lpl`. Raises ConfigError when the path leads through another value.
    """
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: write it as key=value or key.key=value")
    mark = f"--set {key.strip()}"
    parsed = parse(f"value: {value}", f"--set {text!r}").data
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set {text!r}: the value must be one YAML value on one line")
    marks = {p: m for p, m in document.marks.items() if p[: len(path)] != tuple(path)}
    data: Any = _assign(document.data, path, parsed["value"], mark, marks, ())
    return Document(document.name, data, document.base, marks, document.packaged)


def dump(data: Mapping[str, Any]) -> str:
    """Return a mapping as YAML text that `parse` reads back unchanged."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _assign(old: Any, path: list[str], value: Any, mark: str, marks: dict[Keys, int | str], at: Keys) -> Any:
    """Return `old` with the value at a path, copying what changes; records the mark."""
    if not path:
        marks[at] = mark
        return value
    head, rest = path[0], path[1:]
    if isinstance(old, list):
        if not head.isdecimal() or int(head) >= len(old):
            raise ConfigError(
                f"{mark}: {dotted(at)} is a list of {len(old)}; write an index from 0, not {head!r}"
            )
        index = int(head)
        changed = _assign(old[index], rest, value, mark, marks, (*at, index))
        return [*old[:index], changed, *old[index + 1 :]]
    if isinstance(old, str) and at:
        old = {"name": old}
    if old is not None and not isinstance(old, dict):
        raise ConfigError(f"{mark}: {dotted(at)} is {_brief(old)}, it has no key {head!r}")
    mapping = dict(old or {})
    mapping[head] = _assign(mapping.get(head), rest, value, mark, marks, (*at, head))
    return mapping


class _Builder:
    """Turns composed nodes into plain values, counting what aliases expand to."""

    def __init__(self, name: str) -> None:
        self.marks: dict[Keys, int | str] = {}
        self._name = name
        self._expanded = 0

    def build(self, node: yaml.Node | None, path: Keys = ()) -> Any:
        """Return the value of a node and note its line."""
        if node is None:
            return None
        self._count(node, path)
        self.marks.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            self._only(node, "map")
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._only(node, "seq")
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be plain text")
            if key.tag == "tag:yaml.org,2002:merge":
                for part in self._merges(value, path):
                    merged = {**part, **merged}
                continue
            if key.value in own:
                raise self._error(key, f"duplicate key {key.value!r}; keep one of them")
            self.marks[(*path, key.value)] = key.start_mark.line + 1
            own[key.value] = self.build(value, (*path, key.value))
        return {**merged, **own}

    def _merges(self, value: yaml.Node, path: Keys) -> Iterator[dict[str, Any]]:
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(part, yaml.MappingNode):
                raise self._error(part, "<< merges mappings only")
            yield self.build(part, path)

    def _scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise self._error(node, f"{reprlib.repr(text)} is no {kind} that can be read") from error
        raise self._error(node, f"the tag {node.tag!r} is not allowed; write the plain value")

    def _only(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._error(node, f"the tag {node.tag!r} is not allowed; write the plain value")

    def _count(self, node: yaml.Node, path: Keys) -> None:
        if len(path) > MAX_DEPTH:
            raise self._error(node, f"nested deeper than {MAX_DEPTH} levels")
        self._expanded += 16 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._expanded > MAX_EXPANDED:
            raise self._error(node, "its aliases expand to more than a config may hold")

    def _error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._name}, line {node.start_mark.line + 1}: {problem}")


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return reprlib.repr(value)
