"""How finely a stage is cut: as the arena asks for, or where smaller slots leave room to retain more."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from blockstream.module.prepared import Prepared
from blockstream.plan.layout import ALIGN, align_up
from blockstream.plan.planner import least_arena
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.search import Limits, best_of_policy
from blockstream.plan.segments import Schedule

from .costs import default_costs
from .stage_facts import Facts

#: Segments below this are not cut to gain time: a visit and a load have a cost of their own.
CUT_NBYTES = 128 << 20
#: A finer cut is kept if this much less time is expected.
CUT_GAIN = 0.01


def cut_apart(facts: Facts, prepared: Prepared, room: int) -> Facts:
    """Return a stage whose experts are read one by one, where there is no room for all of its weights.

    Tiny experts go on with their block: places for them would take more.
    """
    whole = sum(align_up(layout.nbytes) for layout in facts.cut.layouts.values())
    if facts.cut.experts or whole <= room:
        return facts
    apart = facts.recut(prepared, facts.finer, apart=True)
    if not apart.cut.experts:
        return facts
    needs, needed = (least_arena(Schedule.of([default_costs(f)])) + f.shelf_nbytes for f in (apart, facts))
    return apart if needs < needed else facts


def cut_to_fit(facts: Facts, prepared: Prepared, room: int, slots: int | None, apart: bool = True) -> Facts:
    """Return a stage cut finer when two of its segments do not fit: as fine as it takes, or can be.

    In the end experts and heads are read by parts.
    """
    for parts in (2, 4, None):
        whole = Schedule.of([default_costs(facts)])
        if least_arena(whole, slots) <= room:
            break
        resident = sum(s.nbytes for s in whole.stages[0].segments if s.resident)
        limit = 1 if parts is None else max((room - resident) // parts, 1)
        facts = facts.recut(prepared, limit, apart=parts is None)
    return facts


def cut_to_gain(facts: Facts, prepared: Prepared, room: int, policies: Sequence[RetentionPolicy]) -> Facts:
    """Return a stage cut finer as long as time is gained: small slots leave room to retain more.

    Only where a rehearsal has shown that each piece is called by itself, once the others are done; not where
    the module declares its order, nor where nothing is read twice.
    """
    costs = default_costs(facts)
    fits = sum(align_up(s.nbytes) for s in costs.segments) <= room
    if facts.cut.declared or facts.passes.expected < 2 or fits:
        return facts
    expected_s = _alone(facts, room, policies)
    while not facts.guessed and expected_s < inf:  # else it will be refused
        largest = max((layout.nbytes for layout in facts.cut.layouts.values()), default=0)
        if largest < CUT_NBYTES:
            break
        finer = facts.recut(prepared, 3 * largest // 4)  # most often the modules that a block consists of
        shown = not finer.guessed and finer.unvisited_nbytes == facts.unvisited_nbytes
        finer_s = _alone(finer, room, policies)
        if not shown or finer_s > (1 - CUT_GAIN) * expected_s:
            break
        facts, expected_s = finer, finer_s
    return facts


def _alone(facts: Facts, room: int, policies: Sequence[RetentionPolicy]) -> float:
    """Return the seconds that a stage takes by itself in an arena, by the recurrence; inf without room."""
    costs, limits = default_costs(facts), Limits(room, None, None, ALIGN)
    if least_arena(Schedule.of([costs])) > room:  # what a block holds beside its pieces stays resident
        return inf
    return min(best_of_policy(costs, policy, limits).wall_s for policy in policies)
