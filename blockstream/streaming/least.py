"""The least arena that modules stream in, however finely they are cut."""

from __future__ import annotations

from collections.abc import Iterable

from blockstream.module.shelf import Places
from blockstream.plan.planner import least_arena
from blockstream.plan.segments import Schedule, Segment, Stage

from .declared import Declared


def finest_arena_nbytes(stages: Iterable[Declared], slots: int | None = None, apart: bool = True) -> int:
    """Return two slots of the largest single modules beside what stays, of the stage that needs most.

    A plan for less than its own segments need cuts them so, and reads experts one by one where they can be
    read `apart`; nothing is changed here.
    """
    finest, shelves = [], 0
    for stage in stages:
        whole = _finest(stage, False)
        made = _finest(stage, True) if apart else whole
        best = min((made, whole), key=lambda item: least_arena(Schedule.of([item[0]]), slots) + item[1])
        finest.append(best[0])
        shelves += best[1]
    return least_arena(Schedule.of(finest), slots) + shelves


def _finest(stage: Declared, apart: bool) -> tuple[Stage, int]:
    """Return the finest cut of a stage, and the bytes of the shelf for its experts."""
    cut = stage.prepared.cut(1, apart)
    parts = [(cut.layouts[part.name].nbytes, part.resident) for part in cut.parts]
    segments = tuple(Segment(str(i), n, 0.0, 0.0, resident=stays) for i, (n, stays) in enumerate(parts))
    resident = [i for i, s in enumerate(segments) if s.resident]
    streamed = [i for i, s in enumerate(segments) if not s.resident]
    made = Stage(stage.name, segments, (*resident, *streamed, *resident))
    return made, Places(cut.experts).least_nbytes
