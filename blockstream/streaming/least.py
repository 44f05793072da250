"""The least arena that modules stream in, however finely they are cut."""

from __future__ import annotations

from collections.abc import Iterable

from blockstream.module.prepared import Prepared
from blockstream.plan.planner import least_arena
from blockstream.plan.segments import Schedule, Segment, Stage


def finest_arena_nbytes(modules: Iterable[Prepared], slots: int | None = None) -> int:
    """Return two slots of the largest single modules beside what stays, of the stage that needs most.

    A plan for less than its own segments need cuts them so; nothing is changed here.
    """
    stages = []
    for prepared in modules:
        parts = prepared.finest()
        segments = tuple(Segment(str(i), n, 0.0, 0.0, resident=stays) for i, (n, stays) in enumerate(parts))
        resident = [i for i, s in enumerate(segments) if s.resident]
        streamed = [i for i, s in enumerate(segments) if not s.resident]
        stages.append(Stage(prepared.name, segments, (*resident, *streamed, *resident)))
    return least_arena(Schedule.of(stages), slots)
