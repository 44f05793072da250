"""Static memory planning: an extent of the arena for every load of a stage, before anything runs.

Retained segments lie one after another; streamed ones share a region in which a load never overlaps
the `slots - 1` loads before it. Two placements are tried and the smaller kept: equal slots in
rotation, and the two ends of the region in turn (least memory for two slots of unequal segments).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
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

    `retained` maps a segment to its extent. `streamed[p % len(streamed)][k]` is the extent of the
    k-th streamed visit of pass p; `ordinal[position]` is that k, or -1 for a retained segment.
    `unplanned[i]` is where segment i goes when it is asked for out of the order. `nbytes` is the
    exact peak of the bytes in use, `end` the first byte after them all.
    """

    order: tuple[int, ...]
    retained: dict[int, Extent]
    streamed: tuple[tuple[Extent, ...], ...]
    ordinal: tuple[int, ...]
    unplanned: tuple[Extent, ...]
    nbytes: int
    end: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", max((x.end for x in self.extents), default=0))

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Return every extent that is ever used; those of the slots overlap."""
        return (*self.retained.values(), *(x for one in self.streamed for x in one), *self.unplanned)

    @property
    def base(self) -> int:
        """Return where the slots begin; 0 without any."""
        return min((x.offset for one in self.streamed for x in one), default=0)

    @property
    def is_scattered(self) -> bool:
        """Return whether there are holes between the extents, left by what a plan before it retained."""
        return self.end > self.nbytes

    def extent(self, pass_index: int, position: int) -> Extent:
        """Return the extent of the segment visited at `position` of a pass."""
        if position >= len(self.order):
            return self.unplanned[position - len(self.order)]
        k = self.ordinal[position]
        if k < 0:
            return self.retained[self.order[position]]
        return self.streamed[pass_index % len(self.streamed)][k]

    def mirrored(self, arena_nbytes: int) -> StageLayout:
        """Return the layout counted from the other end of the arena."""

        def flip(x: Extent) -> Extent:
            return Extent(arena_nbytes - x.end, x.nbytes)

        return StageLayout(
            self.order,
            {i: flip(x) for i, x in self.retained.items()},
            tuple(tuple(flip(x) for x in one) for one in self.streamed),
            self.ordinal,
            tuple(flip(x) for x in self.unplanned),
            arena_nbytes,
        )


def streamed_sizes(stage: Stage, retained: Collection[int], align: int = ALIGN) -> list[int]:
    """Return the padded sizes of the visits that load in every pass, in order."""
    return [align_up(stage.segments[i].nbytes, align) for i in stage.order if i not in retained]


def slot_room(stage: Stage, retained: Collection[int], slots: int, align: int = ALIGN) -> int:
    """Return the bytes of the region that `slots` loads of a stage share."""
    sizes = streamed_sizes(stage, retained, align)
    unplanned = [align_up(stage.segments[i].nbytes, align) for i in stage.unvisited]
    least = max(unplanned, default=0)
    if not sizes:
        return least
    return max(least, min(_rotation_room(sizes, slots), _two_ends_room(sizes, slots)))


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
    streamed = tuple(
        tuple(Extent(region.offset + x.offset, x.nbytes) for x in one)
        for one in _place(streamed_sizes(stage, keep, align), slots)
    )
    sized = [align_up(s.nbytes, align) for s in stage.segments]
    unplanned = tuple(where.get(i, Extent(region.offset, nbytes)) for i, nbytes in enumerate(sized))
    ordinal, k = [], 0
    for i in stage.order:
        ordinal.append(-1 if i in keep else k)
        k += i not in keep
    nbytes = room + sum(x.nbytes for x in where.values())
    return StageLayout(stage.order, where, streamed, tuple(ordinal), unplanned, nbytes)


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


def _rotating(sizes: Sequence[int], slots: int) -> int:
    """Return how many slots are of use: one load a pass still overlaps the compute of the pass before."""
    return min(slots, max(len(sizes), 2))


def _rotation_room(sizes: Sequence[int], slots: int) -> int:
    return _rotating(sizes, slots) * max(sizes)


def _two_ends_room(sizes: Sequence[int], slots: int) -> int:
    """Return the largest sum of two consecutive loads, the wrap to the next pass included."""
    if slots != 2:
        return _rotation_room(sizes, slots)
    return max(a + b for a, b in pairwise([*sizes, sizes[0]]))


def _place(sizes: Sequence[int], slots: int) -> tuple[tuple[Extent, ...], ...]:
    """Return the extents pass by pass until they repeat: at most `slots` different passes."""
    if not sizes:
        return ((),)
    stride = max(sizes)
    room = _two_ends_room(sizes, slots)
    from_ends = room < _rotation_room(sizes, slots)
    count = 2 if from_ends else _rotating(sizes, slots)
    passes = []
    for p in range(count):
        first = p * len(sizes)
        if p and first % count == 0:
            break
        extents = []
        for k, nbytes in enumerate(sizes):
            slot = (first + k) % count
            if from_ends:
                extents.append(Extent(room - nbytes if slot else 0, nbytes))
            else:
                extents.append(Extent(slot * stride, nbytes))
        passes.append(tuple(extents))
    return tuple(passes)
