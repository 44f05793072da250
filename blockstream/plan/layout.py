"""Static memory planning: an extent of the arena for every load of a stage, before anything runs.

Retained segments lie one after another; streamed ones share a region in which a load never overlaps
the `slots - 1` loads before it. Two placements are tried and the smaller kept: equal slots in
rotation, and the two ends of the region in turn (least memory for two slots of unequal segments).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .segments import Extent, Stage

#: Direct I/O wants block-aligned addresses, and a page is what the system gives and takes back.
ALIGN = 4096


def align_up(n: int, align: int = ALIGN) -> int:
    """Return the least multiple of `align` that is not below `n`."""
    return -(-n // align) * align


@dataclass(frozen=True)
class StageLayout:
    """Where each load of a stage goes.

    `retained` maps a segment to its extent. `first[k]` is the extent of the k-th streamed visit of the first
    pass, `streamed[(p - 1) % len(streamed)][k]` of pass p; `ordinal[position]` and, for later passes,
    `ordinal_later[position]` is that k, or -1 for a segment retained or not visited.
    `unplanned[i]` is where segment i goes when it is asked for out of the order. `nbytes` is the
    exact peak of the bytes in use, `end` the first byte after them all.
    """

    order: tuple[int, ...]
    retained: dict[int, Extent]
    first: tuple[Extent, ...]
    streamed: tuple[tuple[Extent, ...], ...]
    ordinal: tuple[int, ...]
    ordinal_later: tuple[int, ...]
    unplanned: tuple[Extent, ...]
    nbytes: int
    end: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", max((x.end for x in self.extents), default=0))

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Return every extent that is ever used; those of the slots overlap."""
        return (*self.retained.values(), *self._slots, *self.unplanned)

    @property
    def base(self) -> int:
        """Return where the slots begin; 0 without any."""
        return min((x.offset for x in self._slots), default=0)

    @property
    def _slots(self) -> Iterator[Extent]:
        return (x for one in (self.first, *self.streamed) for x in one)

    @property
    def is_scattered(self) -> bool:
        """Return whether there are holes between the extents, left by what a plan before it retained."""
        return self.end > self.nbytes

    def extent(self, pass_index: int, position: int) -> Extent:
        """Return the extent of the segment visited at `position` of a pass."""
        if position >= len(self.order):
            return self.unplanned[position - len(self.order)]
        k = self.ordinal_later[position] if pass_index else self.ordinal[position]
        if k < 0:
            return self.retained[self.order[position]]
        return self.streamed[(pass_index - 1) % len(self.streamed)][k] if pass_index else self.first[k]

    def mirrored(self, arena_nbytes: int) -> StageLayout:
        """Return the layout counted from the other end of the arena."""

        def flip(x: Extent) -> Extent:
            return Extent(arena_nbytes - x.end, x.nbytes)

        return StageLayout(
            self.order,
            {i: flip(x) for i, x in self.retained.items()},
            tuple(flip(x) for x in self.first),
            tuple(tuple(flip(x) for x in one) for one in self.streamed),
            self.ordinal,
            self.ordinal_later,
            tuple(flip(x) for x in self.unplanned),
            arena_nbytes,
        )


def _sizes(stage: Stage, retained: Collection[int], align: int = ALIGN) -> tuple[list[int], list[int]]:
    """Return the padded sizes of the visits that load in the first pass, and in every later one, in order."""
    first, later = (
        [
            align_up(stage.segments[i].nbytes, align)
            for i in map(stage.order.__getitem__, stage.positions(n))
            if i not in retained
        ]
        for n in range(2)
    )
    return first, later


def slot_room(stage: Stage, retained: Collection[int], slots: int, align: int = ALIGN) -> int:
    """Return the bytes of the region that `slots` loads of a stage share."""
    first, later = _sizes(stage, retained, align)
    unplanned = [align_up(stage.segments[i].nbytes, align) for i in stage.unvisited]
    least = max(unplanned, default=0)
    if not first:
        return least
    return max(least, min(_rotation_room(first, later, slots), _two_ends_room(first, later, slots)))


def lay_out_stage(
    stage: Stage,
    retained: Sequence[int],
    slots: int,
    align: int = ALIGN,
    kept: Mapping[int, Extent] | None = None,
    base: int = 0,
) -> StageLayout:
    """Return the extents of one stage: slots at the start of the arena, then what is retained.

    Retained segments are laid out in the order of their first visit: in the last pass they are
    released in that order, and the next stage's loads find one growing hole. Those in `kept` stay at
    their extents; then the slots go to `base`, or else, like everything else, to the lowest hole.
    """
    keep = frozenset(retained)
    where = {i: x for i, x in (kept or {}).items() if i in keep}
    room = slot_room(stage, keep, slots, align)
    region = Extent(base if where else 0, room)
    if any(region.overlaps(x) for x in where.values()):
        region = _Holes(where.values()).take(room)
    holes = _Holes((region, *where.values()))
    for i in stage.visited:
        if i in keep and i not in where:
            where[i] = holes.take(align_up(stage.segments[i].nbytes, align))
    first, *streamed = (
        tuple(Extent(region.offset + x.offset, x.nbytes) for x in one)
        for one in _place(*_sizes(stage, keep, align), slots)
    )
    sized = [align_up(s.nbytes, align) for s in stage.segments]
    unplanned = tuple(where.get(i, Extent(region.offset, nbytes)) for i, nbytes in enumerate(sized))
    nbytes = room + sum(x.nbytes for x in where.values())
    ordinals = (_ordinal(stage.order, keep), _ordinal(stage.order, keep | stage.once))
    return StageLayout(stage.order, where, first, tuple(streamed), *ordinals, unplanned, nbytes)


def lay_out_all(stage: Stage, base: int, align: int = ALIGN) -> StageLayout:
    """Return the extents of a stage that keeps all its segments, one after another from `base`.

    They lie in the order of the segments, whatever the order of visits: another order moves none.
    """
    where, at = dict[int, Extent](), base
    for i, segment in enumerate(stage.segments):
        where[i] = Extent(at, align_up(segment.nbytes, align))
        at = where[i].end
    kept = (-1,) * len(stage.order)
    return StageLayout(stage.order, where, (), ((),), kept, kept, tuple(where.values()), at)


def _ordinal(order: Sequence[int], without: Collection[int]) -> tuple[int, ...]:
    """Return the how-manieth of the others each position is, -1 for those left out."""
    ordinal, k = [], 0
    for i in order:
        ordinal.append(-1 if i in without else k)
        k += i not in without
    return tuple(ordinal)


class _Holes:
    """What is free between some extents, lowest first; after the last of them all is."""

    def __init__(self, taken: Iterable[Extent]) -> None:
        self._free: list[Extent] = []
        offset = 0
        for x in sorted(taken):
            if x.offset > offset:
                self._free.append(Extent(offset, x.offset - offset))
            offset = max(offset, x.end)
        self._free.append(Extent(offset, sys.maxsize - offset))

    def take(self, nbytes: int) -> Extent:
        """Return the start of the lowest hole that is large enough."""
        k = next(k for k, x in enumerate(self._free) if x.nbytes >= nbytes)
        hole = self._free[k]
        if hole.nbytes == nbytes:
            del self._free[k]
        else:
            self._free[k] = Extent(hole.offset + nbytes, hole.nbytes - nbytes)
        return Extent(hole.offset, nbytes)


def _rotating(first: Sequence[int], later: Sequence[int], slots: int) -> int:
    """Return how many slots are of use: one load a pass still overlaps the compute of the pass before."""
    return min(slots, max(len(first), 2 if later else 1))


def _rotation_room(first: Sequence[int], later: Sequence[int], slots: int) -> int:
    return _rotating(first, later, slots) * max(first)


def _two_ends_room(first: Sequence[int], later: Sequence[int], slots: int) -> int:
    """Return the largest sum of two consecutive loads, the wrap to the next pass included."""
    if slots != 2:
        return _rotation_room(first, later, slots)
    loads = [*first, *later, (later or first)[0]]
    return max(a + b for a, b in pairwise(loads))


def _place(first: Sequence[int], later: Sequence[int], slots: int) -> list[tuple[Extent, ...]]:
    """Return the extents of the first pass, then those of later ones until they repeat."""
    if not first:
        return [(), ()]
    stride = max(first)
    room = _two_ends_room(first, later, slots)
    from_ends = room < _rotation_room(first, later, slots)
    count = 2 if from_ends else _rotating(first, later, slots)

    def extents(load: int, sizes: Sequence[int]) -> tuple[Extent, ...]:
        at = [((load + k) % count, nbytes) for k, nbytes in enumerate(sizes)]
        if from_ends:
            return tuple(Extent(room - nbytes if slot else 0, nbytes) for slot, nbytes in at)
        return tuple(Extent(slot * stride, nbytes) for slot, nbytes in at)

    passes = [extents(0, first)]
    for p in range(count):
        if p and p * len(later) % count == 0:
            break
        passes.append(extents(len(first) + p * len(later), later))
    return passes
