"""How finely a stage is cut: as the arena asks for, or where smaller slots leave room to retain more."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from blockstream.plan.layout import ALIGN, align_up
from blockstream.plan.planner import least_arena
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.search import Limits, best_of_policy
from blockstream.plan.segments import Schedule

from .costs import default_costs

if TYPE_CHECKING:
    from .stage import StreamedStage

#: Segments below this are not cut to gain time: a visit and a load have a cost of their own.
CUT_NBYTES = 128 << 20
#: A finer cut is kept if this much less time is expected.
CUT_GAIN = 0.01


def cut_to_fit(stage: StreamedStage, room: int, slots: int | None) -> None:
    """Cut a stage into smaller segments when two of its own do not fit: as fine as it takes, or can be."""
    for parts in (2, 4, None):
        whole = Schedule.of([default_costs(stage)])
        if least_arena(whole, slots) <= room:
            return
        resident = sum(s.nbytes for s in whole.stages[0].segments if s.resident)
        stage.install(finer=1 if parts is None else max((room - resident) // parts, 1))


def cut_to_gain(stage: StreamedStage, room: int, policies: Sequence[RetentionPolicy]) -> None:
    """Cut a stage's largest segments as long as time is gained: smaller slots leave room to retain more.

    Only where example inputs have shown that each piece is called by itself, once the others are done; not
    where the module declares its order, nor where nothing is read twice.
    """
    costs = default_costs(stage)
    fits = sum(align_up(s.nbytes) for s in costs.segments) <= room
    if stage.prepared.declared or stage.passes.expected < 2 or fits:
        return
    expected_s = _alone(stage, room, policies)
    while not stage.guessed and expected_s < inf:  # else it will be refused
        limit, unused = stage.finer, stage.unvisited_nbytes
        largest = max((layout.nbytes for layout in stage.prepared.layouts.values()), default=0)
        if largest < CUT_NBYTES:
            return
        stage.install(finer=3 * largest // 4)  # most often the modules that a block consists of
        shown = not stage.guessed and stage.unvisited_nbytes == unused
        finer_s = _alone(stage, room, policies)
        if not shown or finer_s > (1 - CUT_GAIN) * expected_s:
            stage.install(finer=sys.maxsize if limit is None else limit)
            return
        expected_s = finer_s


def _alone(stage: StreamedStage, room: int, policies: Sequence[RetentionPolicy]) -> float:
    """Return the seconds that a stage takes by itself in an arena, by the recurrence; inf without room."""
    costs, limits = default_costs(stage), Limits(room, None, None, ALIGN)
    if least_arena(Schedule.of([costs])) > room:  # what a block holds beside its pieces stays resident
        return inf
    return min(best_of_policy(costs, policy, limits).wall_s for policy in policies)
