"""Turn a schedule, its costs and an arena into a plan: what stays, where each load goes, how long it takes.

Pure: no torch, no threads, no clock, no I/O. Candidates (policy, slot count) are ranked by the
recurrence of `simulate.estimate`, the finalists simulated event by event, and the least predicted
time wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from . import simulate
from .arrangement import Arrangement, StagePlan
from .layout import ALIGN, StageLayout, align_up, lay_out_all, lay_out_stage
from .retention import POLICIES, RetentionPolicy
from .search import Candidate, Limits, Ranked, best_of_policy, least_of
from .segments import Exactly, Schedule, Stage


@dataclass(frozen=True)
class Plan(Arrangement):
    """What the engine executes, and what that is predicted to take."""

    @cached_property
    def predicted(self) -> simulate.Prediction:
        """Return the predicted timeline, summed per stage."""
        return simulate.predict(self)


@dataclass(frozen=True)
class Observed:
    """What a run shows when it is planned anew; costs come in the schedule, memory as the arena's bytes.

    `stage` is the one that runs, `passes_left` its passes to come, the running one included, `kept`
    the segments of it that `plan` retains and that are in memory now. Extents end at `end_nbytes`.
    """

    plan: Plan
    stage: int
    passes_left: int
    kept: frozenset[int]
    end_nbytes: int

    def remaining(self, stage: Stage) -> Stage:
        """Return the stage with the passes that are left."""
        over = max(0, stage.passes.expected - self.passes_left)
        return replace(stage, passes=Exactly(max(1, self.passes_left)), pace=stage.pace[over:])


def make_plan(
    schedule: Schedule,
    arena_nbytes: int,
    policies: Sequence[RetentionPolicy] = POLICIES,
    *,
    slots: int | None = None,
    lookahead: int | None = None,
    align: int = ALIGN,
    thrifty: bool = False,
    observed: Observed | None = None,
) -> Plan:
    """Return the plan of least predicted time among the policies that fit.

    `arena_nbytes` bounds the weights held at once; `slots` fixes the slot count. On a tie the plan
    that reads fewer bytes wins; `thrifty` prefers the least memory that is as fast within 0.1%.
    Every rival's own plan is among the finalists, so several policies are never slower than one.
    `observed` plans the rest of a run: what it retains and the new plan retains too stays where it is.
    Raises BudgetError naming the least arena when this one cannot hold two slots.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"{slots} slots: streaming needs one, overlap two")

    def fastest(nbytes: int) -> tuple[Plan, float]:
        limits = Limits(nbytes, slots, lookahead, align)
        if observed is None:
            plan = _fastest(schedule, policies, limits)
            return plan, plan.predicted.wall_s
        plan = _fastest_rest(schedule, policies, limits, observed)
        return plan, remaining(plan, observed).wall_s

    best, best_s = fastest(arena_nbytes)
    if not thrifty:
        return best
    low, high = least_arena(_rest(schedule, observed), slots, align), best.arena_nbytes
    for _ in range(8):
        if high - low <= align:
            break
        middle = align_up((low + high) // 2, align)
        plan, plan_s = fastest(middle)
        if plan_s <= best_s * 1.001:
            best, high = plan, plan.arena_nbytes
        else:
            low = middle
    return best


def least_arena(schedule: Schedule, slots: int | None = None, align: int = ALIGN) -> int:
    """Return the smallest arena that streams the schedule: two slots beside what is resident.

    Two slots suffice for overlap; a stage with one streamed visit a pass needs one.
    """
    return max(least_of(stage, slots, align)[0] for stage in schedule.stages)


def together(plan: Plan, arena_nbytes: int, align: int = ALIGN) -> Plan | None:
    """Return a plan that keeps all of every stage beside the others, None where they do not fit.

    For stages that are called in turn, again and again: nothing is read twice.
    """
    at, stages = 0, list[StagePlan]()
    for stage in plan.schedule.stages:
        stages.append(StagePlan("all", 1, lay_out_all(stage, at, align)))
        at = stages[-1].layout.end
    if at > arena_nbytes:
        return None
    return Plan(plan.schedule, tuple(stages), at, plan.lookahead, keeps=True)


def remaining(plan: Plan, observed: Observed) -> simulate.Estimate:
    """Return what is left of a run under a plan, by the recurrence: seconds and bytes read."""
    wall_s, read_nbytes = 0.0, 0
    for i in range(observed.stage, len(plan.stages)):
        stage, planned = plan.schedule.stages[i], plan.stages[i]
        here = i == observed.stage
        estimate = simulate.estimate(
            observed.remaining(stage) if here else stage,
            frozenset(planned.retained),
            planned.slots,
            plan.lookahead,
            observed.kept if here else (),
        )
        wall_s, read_nbytes = wall_s + estimate.wall_s, read_nbytes + estimate.read_nbytes
    return simulate.Estimate(wall_s, read_nbytes)


def _rest(schedule: Schedule, observed: Observed | None) -> Schedule:
    return schedule if observed is None else Schedule(schedule.stages[observed.stage :])


def _fastest(schedule: Schedule, policies: Sequence[RetentionPolicy], limits: Limits) -> Plan:
    options = [{p.name: best_of_policy(s, p, limits) for p in policies} for s in schedule.stages]
    # One pure plan a policy, and the mixture of each stage's best: the least of all these cannot
    # be slower than any single policy, whatever the stages do to one another.
    mixtures = [tuple(stage[p.name] for stage in options) for p in policies]
    mixtures.append(tuple(min(stage.values(), key=_rank) for stage in options))
    plans = [_assemble(schedule, [c.candidate for c in choice], limits) for choice in dict.fromkeys(mixtures)]
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda p: (round(p.predicted.wall_s, 9), p.predicted.read_nbytes, p.arena_nbytes))


def _rank(r: Ranked) -> tuple[float, int, int]:
    return r.rank


def _fastest_rest(
    schedule: Schedule, policies: Sequence[RetentionPolicy], limits: Limits, observed: Observed
) -> Plan:
    """Return the plan of what is left: each stage's best by the recurrence."""
    chosen = []
    for i in range(observed.stage, len(schedule.stages)):
        here = i == observed.stage
        stage = observed.remaining(schedule.stages[i]) if here else schedule.stages[i]
        there = observed.kept if here else frozenset[int]()
        ranked = [best_of_policy(stage, p, limits, there) for p in policies]
        chosen.append(min(ranked, key=_rank).candidate)
    return _assemble(schedule, chosen, limits, observed)


def _assemble(
    schedule: Schedule, chosen: Sequence[Candidate], limits: Limits, observed: Observed | None = None
) -> Plan:
    """Lay the stages out in one arena, each from the end that lets its head load earlier.

    `chosen` are the candidates of the last stages; those before them are over and stay as they were.
    """
    over = len(schedule.stages) - len(chosen)
    drafts = [
        lay_out_stage(stage, c.retained, c.slots, limits.align)
        for stage, c in zip(schedule.stages[over:], chosen, strict=True)
    ]
    before = list(observed.plan.stages[:over]) if observed is not None else []
    if observed is not None:
        drafts[0] = _lay_out_around(schedule.stages[over], chosen[0], drafts[0], limits.align, observed)
    arena = max(d.nbytes for d in drafts)
    layouts: list[StageLayout] = []
    for draft in drafts:
        either = [draft]
        if observed is None or layouts:
            either.append(draft.mirrored(arena))
        if layouts:
            last = schedule.stages[over + len(layouts) - 1]
            either.sort(key=lambda x: _wait_for(last, layouts[-1], x))
        layouts.append(either[0])
    plans = (StagePlan(c.policy, c.slots, x) for c, x in zip(chosen, layouts, strict=True))
    return Plan(schedule, (*before, *plans), arena, limits.lookahead)


def _lay_out_around(
    stage: Stage, chosen: Candidate, fresh: StageLayout, align: int, observed: Observed
) -> StageLayout:
    """Return the layout that leaves what is kept where it is; the fresh one if that has no room."""
    running = observed.plan.stages[observed.stage].layout
    kept = {i: running.retained[i] for i in chosen.retained if i in observed.kept}
    around = lay_out_stage(stage, chosen.retained, chosen.slots, align, kept, running.base)
    return around if around.end <= max(observed.end_nbytes, fresh.end) else fresh


def _wait_for(stage: Stage, before: StageLayout, after: StageLayout) -> tuple[int, ...]:
    """Return, for the first two loads after a stage, up to which visit of its last pass they wait."""
    last = stage.passes.expected - 1
    positions = stage.positions(last)
    extents = [before.extent(last if positions else 0, k) for k in positions or stage.positions(0)]
    waits = []
    for position in range(min(2, len(after.order))):
        head = after.extent(0, position)
        waits.append(max((k for k, x in enumerate(extents) if x.overlaps(head)), default=-1))
    return tuple(waits)
