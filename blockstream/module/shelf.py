"""The shelf: memory for experts, read as the router chooses them, those used last kept.

Its places are equal; each has room for one expert: one item of each of the weights of an experts module.
A layer's experts are wanted once its router has spoken: they are read ahead, into places whose items nobody
uses, while those that are there compute. A layer keeps its share of the places: over one list of all layers,
used in turn, what was used longest ago is what is needed next.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from blockstream.checkpoint.file_store import FileLoading, FileStore
from blockstream.checkpoint.read.placement import BLOCK, GAP_NBYTES, STAGING_NBYTES, lay_out
from blockstream.errors import EngineError, ModelError
from blockstream.plan.segments import Extent

from .dtypes import to_torch
from .experts import Experts, ExpertTable
from .heads import HeadTable
from .narrow import Narrow
from .weights import Weight

#: One computes while another is read.
LEAST_PLACES = 2


class Places:
    """How much a place of the shelf takes, told from headers: room for the largest item of each kind.

    The kinds are the weights' names in their module.
    """

    def __init__(self, experts: Sequence[Experts]) -> None:
        self.room: dict[str, int] = {}
        for each in experts:
            for kind in each.weights:
                self.room[kind] = max(self.room.get(kind, 0), _room(each.item(kind, 0)))
        self.nbytes = sum(self.room.values())
        self.most = sum(each.count for each in experts)

    @property
    def least_nbytes(self) -> int:
        """Return the bytes of the least shelf."""
        return LEAST_PLACES * self.nbytes


def _room(item: Weight) -> int:
    """Return the most that an item like this one takes in memory, wherever in its files it lies.

    Beside its bytes: what is read over up to a block's border and between tensors, what spills where two
    would overlap, and the staging of what is converted or joined.
    """
    sizes = [sum(t.nbytes for t in r.tensors) for r in item.requests]
    sources = sum(len(r.tensors) for r in item.requests)
    staged = any(len(r.tensors) > 1 or r.dtype not in (None, r.tensors[0].dtype) for r in item.requests)
    nbytes = max(sum(sizes), item.nbytes) + sum(sizes) - max(sizes)
    nbytes += (2 * BLOCK + 64) * sources + GAP_NBYTES * (sources - 1)
    if staged:
        nbytes += 2 * (min(STAGING_NBYTES, sum(sizes)) + 2 * BLOCK)
    return -(-nbytes // BLOCK) * BLOCK


class _Item:
    """One item in a place: being read, or there."""

    def __init__(self, name: str, weight: Weight, slot: int, room: Extent, store: FileStore) -> None:
        self.weight, self.slot = weight, slot
        self._layout = lay_out(name, weight.requests)
        if self._layout.nbytes > room.nbytes:
            raise EngineError(f"{name} takes {self._layout.nbytes} bytes and its place has {room.nbytes}")
        store.open(self._layout)
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(store.arena.view(room), dtype=torch.uint8)
        self._storage = self._bytes.untyped_storage()
        self._uses, self._version = self._count_uses(), self._bytes._version
        self.loading: FileLoading | None = FileLoading(store, "experts", self._layout, room)

    def _count_uses(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))

    def finish(self) -> int:
        """Wait until the item is there; return the bytes read for it."""
        loading, self.loading = self.loading, None
        assert loading is not None
        loading.finish()
        return self._layout.read_nbytes

    def abandon(self) -> None:
        """Give up what is being read of it."""
        if self.loading is not None:
            self.loading.abandon()

    @property
    def is_held(self) -> bool:
        """Return whether anybody has a view of it."""
        return self._count_uses() > self._uses

    def value(self) -> Tensor:
        """Return the item: a view of its place, or numbers widened from there."""
        if self._bytes._version != self._version:
            raise ModelError(
                f"{self.weight.path!r} was written to; streamed weights are read-only, as the next load "
                "would lose what was written"
            )
        with torch.inference_mode(False), torch.no_grad():
            views = {
                name: self._bytes[p.offset : p.offset + p.nbytes].view(to_torch(p.dtype)).view(p.shape)
                for name, p in self._layout.tensors.items()
            }
            spec = self.weight.spec
            if spec is None:
                return next(iter(views.values()))
            raw, *beside = (views[r.param] for r in self.weight.requests)
            narrow = Narrow.of(spec, raw, dict(zip(self.weight.parts, beside, strict=True)))
            wide: Tensor = narrow.wide().view(self.weight.shape)
            return wide


#: An item: the number of its experts module, and of the expert.
_Key = tuple[int, int]


class Shelf:
    """The experts of one module in `places` of an arena from `offset` on. Compute thread only.

    There are `most` places of address space. `read_nbytes` and `waited_s`: what was read so far, and the
    seconds that compute waited for it.
    """

    def __init__(self, store: FileStore, experts: Sequence[Experts], offset: int, most: int) -> None:
        self.each = Places(experts)
        self.places = min(LEAST_PLACES, most)
        self.read_nbytes, self.waited_s = 0, 0.0
        self._store, self._arena, self._offset, self._most = store, store.arena, offset, most
        self._experts = experts
        self._at = dict(zip(self.each.room, accumulate(self.each.room.values(), initial=0), strict=False))
        self._items: dict[str, OrderedDict[_Key, _Item]] = {kind: OrderedDict() for kind in self.each.room}
        self._wanted: dict[str, deque[_Key]] = {kind: deque() for kind in self.each.room}
        self._tables: list[ExpertTable | HeadTable] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes it may take."""
        return self.places * self.each.nbytes

    @property
    def most_nbytes(self) -> int:
        """Return the bytes of its address space."""
        return self._most * self.each.nbytes

    @property
    def extent(self) -> Extent:
        """Return where it may take them."""
        return Extent(self._offset, self.nbytes)

    def serve(self, module: nn.Module, number: int) -> None:
        """Have the stand-ins of an experts module ask here for their items."""
        for kind in self._experts[number].weights:
            table = module._parameters[kind]
            assert isinstance(table, ExpertTable | HeadTable)
            table.expert, table.sooner = partial(self.take, number, kind), partial(self._sooner, number, kind)
            self._tables.append(table)

    def resize(self, nbytes: int) -> None:
        """Take as many places as so many bytes are enough for, the least at least. Between two visits."""
        places = max(LEAST_PLACES, min(nbytes // self.each.nbytes, self._most, self.each.most))
        if places < self.places:
            self.give_up()
            for items in self._items.values():
                for key in [key for key, item in items.items() if item.slot >= places]:
                    del items[key]
            begin = self._offset + places * self.each.nbytes
            self._arena.discard(Extent(begin, self._offset + self.nbytes - begin))
        self.places = places

    def expect(self, number: int, ids: Iterable[int]) -> None:
        """Begin to read the experts that a router chose, in the order they will be used."""
        self.give_up()
        wanted = [(number, i) for i in ids]
        for kind in self._experts[number].weights:
            self._wanted[kind].extend(wanted)
        self._read_ahead()

    def give_up(self) -> None:
        """Want nothing more; what is being read and was not used is given up."""
        for kind, items in self._items.items():
            self._wanted[kind].clear()
            for key in [key for key, item in items.items() if item.loading is not None]:
                items.pop(key).abandon()

    def take(self, number: int, kind: str, i: int) -> Tensor:
        """Return one item of a weight, waiting for it; what is wanted next begins to be read."""
        key, items = (number, i), self._items[kind]
        if key in self._wanted[kind]:
            self._wanted[kind].remove(key)
        item = items.get(key)
        begin = time.perf_counter()
        if item is None:
            item = self._begin(kind, key, must=True)
            assert item is not None
        if item.loading is not None:
            try:
                self.read_nbytes += item.finish()
            except BaseException:
                del items[key]
                raise
            self.waited_s += time.perf_counter() - begin
        items.move_to_end(key)
        value = item.value()
        self._read_ahead()
        return value

    def report(self) -> dict[str, float]:
        """Return what report.json says of it: bytes it may take, bytes read, seconds waited for."""
        return {"nbytes": self.nbytes, "read_nbytes": self.read_nbytes, "waited_s": self.waited_s}

    def forget(self) -> None:
        """Serve nobody any more and drop all views. Idempotent."""
        for table in self._tables:
            del table.expert
        self._tables.clear()
        self._items = {kind: OrderedDict() for kind in self.each.room}

    def close(self) -> None:
        """Stop reading and close the files. Idempotent."""
        self.give_up()
        self._store.close()

    def _sooner(self, number: int, kind: str, ids: list[int]) -> list[int]:
        """Return numbers of experts, those first that are there."""
        items = self._items[kind]

        def is_late(i: int) -> bool:
            item = items.get((number, i))
            return item is None or item.loading is not None

        return sorted(ids, key=is_late)

    def _read_ahead(self) -> None:
        """Begin to read what is wanted and not there, as far as there is room."""
        for kind, wanted in self._wanted.items():
            for key in list(wanted):
                if key not in self._items[kind] and self._begin(kind, key) is None:
                    break

    def _begin(self, kind: str, key: _Key, must: bool = False) -> _Item | None:
        """Begin to read an item; None where all places are in use, or wanted, unless it `must` be."""
        slot = self._slot(kind, key[0], must)
        if slot is None:
            return None
        weight = self._experts[key[0]].item(kind, key[1])
        offset = self._offset + slot * self.each.nbytes + self._at[kind]
        room = Extent(offset, self.each.room[kind])
        item = self._items[kind][key] = _Item(f"{weight.path}[{key[1]}]", weight, slot, room, self._store)
        return item

    def _slot(self, kind: str, number: int, must: bool) -> int | None:
        """Return a place for an item of an experts module: a free one, or that of what was used longest ago.

        What others hold within their share of the places goes last.
        """
        items, wanted = self._items[kind], set(self._wanted[kind])
        if len(items) < self.places:
            used = {item.slot for item in items.values()}
            return next(slot for slot in range(self.places) if slot not in used)
        held, share = Counter(n for n, _ in items), self.places // len(self._experts)
        held[number] += 1
        idle = [key for key, x in items.items() if x.loading is None and key not in wanted and not x.is_held]
        gone = next((key for key in idle if held[key[0]] > share), next(iter(idle), None))
        if gone is None and must:
            gone = next((key for key in reversed(items) if not items[key].is_held), None)
            if gone is None:
                raise ModelError(
                    f"all {self.places} places for experts are in use by views that are kept; use an "
                    "expert's weights only inside the forward of their module, or keep a copy (.clone())"
                )
        if gone is None:
            return None
        item = items.pop(gone)
        item.abandon()
        return item.slot
