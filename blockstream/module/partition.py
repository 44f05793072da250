"""Cut a module into segments: its repeated blocks, what is outside them, tables read by row.

A block is an item of a list (ModuleList, Sequential, ModuleDict) whose class occurs twice or more in
it; the outermost such list counts. What is outside the blocks stays resident while it is small; else
its largest parts become segments of their own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from blockstream.errors import ModelError

from .guards import is_compiled
from .reaching import reached

#: An embedding's table from this size on is gathered row by row instead of loaded.
GATHER_NBYTES = 4 << 20
#: What is outside the blocks may stay up to this size, or that of the largest block.
RESIDENT_NBYTES = 16 << 20
#: An item of a list this much smaller than the largest is no block.
SMALL = 8

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Place(NamedTuple):
    """Where a parameter is bound: a name in a module, by path from the root."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Return the parameter's full name."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Part:
    """One segment of a module: parameters, each with every place it is bound at (tied: several).

    `entry` is the module whose forward the part streams with; None for what stays resident.
    """

    name: str
    entry: str | None
    params: tuple[tuple[Place, ...], ...]

    @property
    def resident(self) -> bool:
        """Return whether the part stays for the whole stage."""
        return self.entry is None


@dataclass(frozen=True)
class Partition:
    """The parts of a module in registration order, and the tables gathered by row."""

    parts: tuple[Part, ...]
    tables: tuple[tuple[Place, ...], ...]
    order: tuple[str, ...] = ()


def partition(
    module: nn.Module,
    nbytes_of: Callable[[str], int],
    *,
    finer: int | None = None,
    gather_nbytes: int | None = None,
    resident_nbytes: int | None = None,
    without: Container[str] = (),
) -> Partition:
    """Return the parts of a module; parameters of paths in `without` are in none.

    `nbytes_of(name)` is the size of a parameter in memory. Blocks above `finer` bytes are cut into
    smaller modules. A module may name its blocks itself, in the order one pass runs them, in a
    method `stream_order() -> Sequence[str]` of module paths.
    """
    return _Cut(module, nbytes_of, finer, gather_nbytes, resident_nbytes, without).cut()


class _Cut:
    """The state of one partition."""

    def __init__(
        self,
        root: nn.Module,
        nbytes_of: Callable[[str], int],
        finer: int | None,
        gather_nbytes: int | None,
        resident_nbytes: int | None,
        without: Container[str],
    ) -> None:
        self.root = root
        self.finer = finer
        self.gather_nbytes = GATHER_NBYTES if gather_nbytes is None else gather_nbytes
        self.resident_nbytes = RESIDENT_NBYTES if resident_nbytes is None else resident_nbytes
        #: Every path of a module, a shared one under several.
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.paths: dict[int, list[str]] = defaultdict(list)
        for path, module in self.modules.items():
            self.paths[id(module)].append(path)
        self.places = _places(root, without)
        #: Modules that take a parameter past the one that holds it: it is there whenever they compute.
        self.takers = reached(root)
        self.taking = {taker for takers in self.takers.values() for taker in takers}
        self.size = {key: nbytes_of(places[0].path) for key, places in self.places.items()}
        self.totals = {p: sum(self.size[k] for k in self._ids(m)) for p, m in self.modules.items()}

    def _ids(self, module: nn.Module) -> set[int]:
        return {id(p) for p in module.parameters() if id(p) in self.places}

    def cut(self) -> Partition:
        declared = _declared(self.root, self.modules)
        entries = list(dict.fromkeys(declared)) or self._blocks()
        if self.finer is not None:
            entries = [e for entry in entries for e in self._finer(entry, self.finer)]
        owned = self._assign(entries)
        left = [key for key in self.places if key not in {k for keys in owned.values() for k in keys}]
        tables, left = self._tables(left)
        largest = max((sum(self.size[k] for k in keys) for keys in owned.values()), default=0)
        extra = self._outside(left, max(self.resident_nbytes, largest))
        owned.update(extra)
        taken = {k for keys in extra.values() for k in keys}
        rest = [key for key in left if key not in taken]
        position = {path: i for i, path in enumerate(self.modules)}
        parts = [
            Part(entry or type(self.root).__name__, entry, self._params(keys, tables))
            for entry, keys in sorted(owned.items(), key=lambda item: position[item[0]])
            if keys
        ]
        if rest:
            parts.insert(0, Part("rest", None, self._params(rest, tables)))
        return Partition(tuple(parts), tuple(tables.values()), tuple(declared))

    # -- blocks ------------------------------------------------------------------------------

    def _blocks(self) -> list[str]:
        hints = {
            name
            for module in self.modules.values()
            for name in getattr(module, "_no_split_modules", None) or ()
            if isinstance(name, str)
        }
        found = list(dict.fromkeys(self._descend("", self.root, hints)))
        biggest = max((self.totals[path] for path in found), default=0)
        return [path for path in found if self.totals[path] * SMALL >= biggest]

    def _descend(self, path: str, module: nn.Module, hints: set[str]) -> Iterator[str]:
        """Yield the items of the outermost lists of repeated modules, each by its first path."""
        children = {n: c for n, c in module.named_children() if next(c.parameters(), None) is not None}
        counts = Counter(type(c) for c in children.values()) if isinstance(module, _LISTS) else Counter()
        for name, child in children.items():
            at = self.paths[id(child)][0]
            if counts[type(child)] >= 2 and _is_item(child, hints) and not _is_list(child):
                yield at
            else:
                yield from self._descend(f"{path}.{name}" if path else name, child, hints)

    def _finer(self, entry: str, limit: int) -> Iterator[str]:
        """Yield the largest modules of at most `limit` bytes inside one, leaves whatever their size."""
        module = self.modules[entry]
        children = [(n, c) for n, c in module.named_children() if self.totals[f"{entry}.{n}"]]
        whole = self.totals[entry] <= limit or not children or id(module) in self.taking
        whole = whole or is_compiled(module)
        if whole and not _is_list(module):
            yield entry
            return
        for name, _ in children:
            yield from self._finer(f"{entry}.{name}", limit)

    def _assign(self, entries: Iterable[str]) -> dict[str, list[int]]:
        """Return the parameters that belong to exactly one entry, by entry."""
        inside: dict[int, set[str]] = defaultdict(set)
        for entry in entries:
            for module in self.modules[entry].modules():
                inside[id(module)].add(entry)
        owned: dict[str, list[int]] = {entry: [] for entry in entries}
        for key, places in self.places.items():
            homes = [inside.get(id(self.modules[p.module]), set()) for p in places]
            homes += [inside.get(taker, set()) for taker in self.takers.get(key, ())]
            if all(h == homes[0] and len(h) == 1 for h in homes):
                owned[next(iter(homes[0]))].append(key)
        return owned

    # -- outside the blocks ------------------------------------------------------------------

    def _tables(self, left: list[int]) -> tuple[dict[int, tuple[Place, ...]], list[int]]:
        """Return the places where tables are gathered, and what is left to load.

        A table that something else uses as well (a tied head) is both.
        """
        tables: dict[int, tuple[Place, ...]] = {}
        remaining = []
        for key in left:
            gathered = tuple(p for p in self.places[key] if _gathers(self.modules[p.module], p.name))
            if gathered and self.size[key] >= self.gather_nbytes and key not in self.takers:
                tables[key] = gathered
            if len(tables.get(key, ())) < len(self.places[key]):
                remaining.append(key)
        return tables, remaining

    def _outside(self, left: list[int], limit: int) -> dict[str, list[int]]:
        """Return parts outside the blocks that become segments, so that the rest stays below `limit`."""
        total = sum(self.size[k] for k in left)
        if total <= limit:
            return {}
        pieces = sorted(self._pieces("", set(left), limit), key=lambda item: -item[1])
        out: dict[str, list[int]] = {}
        for path, _ in pieces:
            if total <= limit:
                break
            inside = {id(m) for m in self.modules[path].modules()}
            keys = [
                k for k in left
                if all(id(self.modules[p.module]) in inside for p in self._loaded_at(k))
                and self.takers.get(k, set()) <= inside
            ]  # fmt: skip
            if keys:
                out[path] = keys
                total -= sum(self.size[k] for k in keys)
        return out

    def _loaded_at(self, key: int) -> list[Place]:
        gathers = self.size[key] >= self.gather_nbytes and key not in self.takers
        return [p for p in self.places[key] if not (gathers and _gathers(self.modules[p.module], p.name))]

    def _pieces(self, path: str, left: set[int], limit: int) -> Iterator[tuple[str, int]]:
        """Yield (path, bytes) of the largest modules that hold nothing but what is left."""
        for name, child in self.modules[path].named_children():
            at = f"{path}.{name}" if path else name
            if self.paths[id(child)][0] != at:
                continue
            keys = self._ids(child)
            nbytes = sum(self.size[k] for k in keys & left)
            if not nbytes:
                continue
            leaf = not any(True for c in child.children() if next(c.parameters(), None) is not None)
            whole = keys <= left
            small = nbytes <= limit and not _is_list(child)
            if _is_list(child) and leaf:
                continue
            if whole and (leaf or small or isinstance(child, nn.MultiheadAttention)):
                yield at, nbytes
            elif not leaf:
                yield from self._pieces(at, left, limit)

    def _params(
        self, keys: Iterable[int], tables: Mapping[int, tuple[Place, ...]]
    ) -> tuple[tuple[Place, ...], ...]:
        return tuple(tuple(p for p in self.places[k] if p not in tables.get(k, ())) for k in keys)


def _places(root: nn.Module, without: Container[str]) -> dict[int, tuple[Place, ...]]:
    """Return every place of each parameter, once for a module that is shared."""
    places: dict[int, list[Place]] = defaultdict(list)
    for path, module in root.named_modules():
        for name, param in module._parameters.items():
            if param is not None and (place := Place(path, name)).path not in without:
                places[id(param)].append(place)
    return {key: tuple(at) for key, at in places.items()}


def _is_list(module: nn.Module) -> bool:
    """Return whether a module has no forward of its own: whatever uses it reaches past it."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return True
    return type(module).forward is nn.Module.forward and "forward" not in module.__dict__


def _is_item(child: nn.Module, hints: set[str]) -> bool:
    """Return whether a repeated module is a block, not a stack of what its library calls blocks."""
    if type(child).__name__ in hints:
        return True
    return not any(type(m).__name__ in hints for m in child.modules())


def _gathers(module: nn.Module, name: str) -> bool:
    """Return whether a parameter is an embedding's table that is only ever looked up by row."""
    if not isinstance(module, nn.Embedding) or name != "weight" or module.max_norm is not None:
        return False
    forward = type(module).forward
    # A forward of its own may still look up by super().forward(...), and only so.
    return forward is nn.Embedding.forward or "__class__" in forward.__code__.co_freevars


def _declared(root: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the module's own `stream_order()`, checked."""
    declare = getattr(root, "stream_order", None)
    if declare is None:
        return []
    order = [str(path) for path in declare()]
    unknown = [path for path in order if path not in modules or not path]
    if unknown:
        raise ModelError(
            f"{type(root).__name__}.stream_order() names {unknown[0]!r}, which is no module of it; "
            "it lists paths as named_modules() has them"
        )
    return order
