"""The least arena a session's modules stream in, however finely they are cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockstream.plan.planner import least_arena
from blockstream.plan.segments import Schedule, Segment, Stage

if TYPE_CHECKING:
    from .session import Session


def finest_arena_nbytes(session: Session) -> int:
    """Return two slots of the largest single modules beside what stays, of the stage that needs most.

    A plan for less than its own segments need cuts them so; nothing is changed here.
    """
    stages = []
    for stage in session._stages:
        parts = stage.prepared.finest()
        segments = tuple(Segment(str(i), n, 0.0, 0.0, resident=stays) for i, (n, stays) in enumerate(parts))
        resident = [i for i, s in enumerate(segments) if s.resident]
        streamed = [i for i, s in enumerate(segments) if not s.resident]
        stages.append(Stage(stage.name, segments, (*resident, *streamed, *resident)))
    return least_arena(Schedule.of(stages), session._planning._slots)
