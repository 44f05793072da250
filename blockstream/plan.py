"""Turn a schedule, its costs and an arena into a plan: what stays, where each load goes, how long it takes.

Pure: no torch, no threads, no clock, no I/O. Candidates (policy, slot count) are ranked by the
recurrence of `simulate.estimate`, the finalists simulated event by event, and the least predicted
time wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from . import simulate
from .errors import BudgetError
from .layout import ALIGN, StageLayout, align_up, lay_out_stage, slot_room
from .retention import POLICIES, RetentionPolicy
from .segments import Extent, Schedule, Stage, Visit

#: Slot counts the planner tries; more than eight never paid in simulation or in practice.
SLOT_COUNTS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class StagePlan:
    """How one stage runs: the policy that won, the segments it retains, slots and extents."""

    policy: str
    slots: int
    layout: StageLayout

    @property
    def retained(self) -> tuple[int, ...]:
        """Return the indices of the retained segments, resident ones included, in layout order."""
        return tuple(self.layout.retained)


@dataclass(frozen=True)
class Plan:
    """What the engine executes. `arena_nbytes` is the exact peak of the extents it uses.

    `lookahead` bounds how many visits past the one computing may be loaded (None: as the slots
    allow; 1: the paper's concurrent inference).
    """

    schedule: Schedule
    stages: tuple[StagePlan, ...]
    arena_nbytes: int
    lookahead: int | None = None

    def extent(self, visit: Visit) -> Extent:
        """Return where the segment of a visit lies in the arena."""
        return self.stages[visit.stage].layout.extent(visit.pass_index, visit.position)

    def is_retained(self, visit: Visit) -> bool:
        """Return whether the segment of a visit stays across passes."""
        stage = self.schedule.stages[visit.stage]
        return stage.index_at(visit.position) in self.stages[visit.stage].layout.retained

    @cached_property
    def predicted(self) -> simulate.Prediction:
        """Return the predicted timeline, summed per stage."""
        return simulate.predict(self)


def make_plan(
    schedule: Schedule,
    arena_nbytes: int,
    policies: Sequence[RetentionPolicy] = POLICIES,
    *,
    slots: int | None = None,
    lookahead: int | None = None,
    align: int = ALIGN,
    thrifty: bool = False,
) -> Plan:
    """Return the plan of least predicted time among the policies that fit.

    `arena_nbytes` bounds the weights held at once; `slots` fixes the slot count. On a tie the plan
    that reads fewer bytes wins; `thrifty` prefers the least memory that is as fast within 0.1%.
    Every rival's own plan is among the finalists, so several policies are never slower than one.
    Raises BudgetError naming the least arena when this one cannot hold two slots.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"{slots} slots: streaming needs one, overlap two")
    best = _fastest(schedule, arena_nbytes, policies, slots, lookahead, align)
    if not thrifty:
        return best
    target = best.predicted.wall_s * 1.001
    low, high = least_arena(schedule, slots, align), best.arena_nbytes
    for _ in range(8):
        if high - low <= align:
            break
        middle = align_up((low + high) // 2, align)
        plan = _fastest(schedule, middle, policies, slots, lookahead, align)
        if plan.predicted.wall_s <= target:
            best, high = plan, plan.arena_nbytes
        else:
            low = middle
    return best


def least_arena(schedule: Schedule, slots: int | None = None, align: int = ALIGN) -> int:
    """Return the smallest arena that streams the schedule: two slots beside what is resident.

    Two slots suffice for overlap; a stage with one streamed visit a pass needs one.
    """
    return max(_least_of(stage, slots, align)[0] for stage in schedule.stages)


def _least_of(stage: Stage, slots: int | None, align: int) -> tuple[int, int, int]:
    """Return (least arena, resident bytes, bytes of the slots) of one stage."""
    resident = _resident(stage)
    held = sum(align_up(stage.segments[i].nbytes, align) for i in resident)
    keep = frozenset(resident)
    everything = sum(align_up(stage.segments[i].nbytes, align) for i in stage.visited)
    room = slot_room(stage, keep, slots or SLOT_COUNTS[0], align)
    return min(held + room, everything), held, room


def _resident(stage: Stage) -> list[int]:
    return [i for i in stage.visited if stage.segments[i].resident]


def _fastest(
    schedule: Schedule,
    arena_nbytes: int,
    policies: Sequence[RetentionPolicy],
    slots: int | None,
    lookahead: int | None,
    align: int,
) -> Plan:
    options = [
        {p.name: _best_of_policy(s, arena_nbytes, p, slots, lookahead, align) for p in policies}
        for s in schedule.stages
    ]
    # One pure plan a policy, and the mixture of each stage's best: the least of all these cannot
    # be slower than any single policy, whatever the stages do to one another.
    mixtures = [tuple(stage[p.name] for stage in options) for p in policies]
    mixtures.append(tuple(min(stage.values(), key=_rank) for stage in options))
    plans = [
        _assemble(schedule, [c.candidate for c in choice], lookahead, align)
        for choice in dict.fromkeys(mixtures)
    ]
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda p: (round(p.predicted.wall_s, 9), p.predicted.read_nbytes, p.arena_nbytes))


@dataclass(frozen=True)
class _Candidate:
    policy: str
    slots: int
    retained: tuple[int, ...]


@dataclass(frozen=True)
class _Ranked:
    candidate: _Candidate
    wall_s: float
    read_nbytes: int
    room: int


def _rank(r: _Ranked) -> tuple[float, int, int]:
    return (round(r.wall_s, 9), r.read_nbytes, r.room)


def _best_of_policy(
    stage: Stage,
    arena_nbytes: int,
    policy: RetentionPolicy,
    slots: int | None,
    lookahead: int | None,
    align: int,
) -> _Ranked:
    """Return the policy's best slot count for one stage, by the recurrence."""
    ranked = []
    for candidate in _candidates(stage, arena_nbytes, policy, slots, align):
        keep = frozenset(candidate.retained)
        estimate = simulate.estimate(stage, keep, candidate.slots, lookahead)
        room = slot_room(stage, keep, candidate.slots, align)
        ranked.append(_Ranked(candidate, estimate.wall_s, estimate.read_nbytes, room))
    if not ranked:
        raise _too_small(stage, arena_nbytes, slots, align)
    return min(ranked, key=_rank)


def _candidates(
    stage: Stage, arena_nbytes: int, policy: RetentionPolicy, slots: int | None, align: int
) -> Iterable[_Candidate]:
    resident = _resident(stage)
    padded = _padded(stage, align)
    held = sum(padded.segments[i].nbytes for i in resident)
    everything = _Candidate(policy.name, slots or SLOT_COUNTS[0], stage.visited)
    all_fit = sum(padded.segments[i].nbytes for i in stage.visited) <= arena_nbytes
    if all_fit and policy.retains:
        yield everything
        return
    fitting = 0
    for count in [slots] if slots else SLOT_COUNTS:
        least = slot_room(stage, frozenset(resident), count, align)
        if held + least > arena_nbytes:
            break
        keep = _retain(policy, padded, resident, count, arena_nbytes)
        if fitting and count > len(stage.order) - len(keep):
            break  # no more slots than loads a pass
        fitting += 1
        yield _Candidate(policy.name, count, keep)
    if all_fit and not fitting:  # a stage smaller than its own two slots
        yield everything


def _retain(
    policy: RetentionPolicy, padded: Stage, resident: Sequence[int], slots: int, arena_nbytes: int
) -> tuple[int, ...]:
    """Return what a policy retains beside `slots` slots, resident segments first.

    What is retained changes which loads are neighbours, and so the room of the slots: it is sized for
    all streamed first, then, should that not hold, for slots of the largest segment.
    """
    if policy.retains:
        held = sum(padded.segments[i].nbytes for i in resident)
        largest = max((padded.segments[i].nbytes for i in padded.visited), default=0)
        for room in (slot_room(padded, frozenset(resident), slots, 1), slots * largest):
            left = arena_nbytes - held - room
            keep = tuple(dict.fromkeys([*resident, *(policy.retain(padded, left) if left > 0 else ())]))
            kept = sum(padded.segments[i].nbytes for i in keep)
            if kept + slot_room(padded, frozenset(keep), slots, 1) <= arena_nbytes:
                return keep
    return tuple(resident)


def _padded(stage: Stage, align: int) -> Stage:
    """Return the stage with every segment at the room its extent takes."""
    segments = tuple(replace(s, nbytes=align_up(s.nbytes, align)) for s in stage.segments)
    return replace(stage, segments=segments)


def _assemble(schedule: Schedule, chosen: Sequence[_Candidate], lookahead: int | None, align: int) -> Plan:
    """Lay the stages out in one arena, each from the end that lets its head load earlier."""
    drafts = [
        lay_out_stage(stage, c.retained, c.slots, align)
        for stage, c in zip(schedule.stages, chosen, strict=True)
    ]
    arena = max(d.nbytes for d in drafts)
    layouts: list[StageLayout] = []
    for draft in drafts:
        either = [draft, draft.mirrored(arena)]
        if layouts:
            before, stage = layouts[-1], schedule.stages[len(layouts) - 1]
            last = stage.passes.expected - 1
            either.sort(key=lambda x: _wait_for(before, last, x))
        layouts.append(either[0])
    plans = (StagePlan(c.policy, c.slots, x) for c, x in zip(chosen, layouts, strict=True))
    return Plan(schedule, tuple(plans), arena, lookahead)


def _wait_for(before: StageLayout, last_pass: int, after: StageLayout) -> tuple[int, ...]:
    """Return, for the first two loads of a stage, up to which visit of the last pass before they wait."""
    extents = [before.extent(last_pass, k) for k in range(len(before.order))]
    waits = []
    for position in range(min(2, len(after.order))):
        head = after.extent(0, position)
        waits.append(max((k for k, x in enumerate(extents) if x.overlaps(head)), default=-1))
    return tuple(waits)


def _too_small(stage: Stage, arena_nbytes: int, slots: int | None, align: int) -> BudgetError:
    least, held, _ = _least_of(stage, slots, align)
    largest = max((stage.segments[i] for i in stage.visited), key=lambda s: s.nbytes)
    return BudgetError(
        f"an arena of {arena_nbytes:,} bytes cannot hold {slots or SLOT_COUNTS[0]} slots of stage "
        f"{stage.name!r} (largest segment {largest.name!r}, {largest.nbytes:,} bytes) beside "
        f"{held:,} bytes that stay resident; the least is {least:,} bytes"
    )
