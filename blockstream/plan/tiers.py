"""Plan a device over host memory: what stays on the device, what of the rest in host memory, what on disk.

Two runs of the same planner. The host's order is what the device misses: all of it in the first pass, what
streams there in every pass after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from blockstream.errors import BudgetError

from .layout import ALIGN
from .planner import Plan, make_plan
from .retention import NONE, POLICIES, RetentionPolicy
from .segments import Schedule, Segment, Stage
from .simulate import Prediction
from .simulate_tiers import predict_tiers


@dataclass(frozen=True)
class TopPlan(Plan):
    """The plan of a device over that of the host memory below: `whole` is the schedule both are made of.

    What it is predicted to take is what both take together.
    """

    host: Plan = field(kw_only=True)
    whole: Schedule = field(kw_only=True)

    @cached_property
    def predicted(self) -> Prediction:
        """Return the predicted timeline of disk, link and compute, summed per stage."""
        return predict_tiers(self, self.host)

    def over(self, host: Plan) -> Prediction:
        """Return what this plan would take over another one of host memory."""
        return joined(self.whole, self, host).device.predicted


@dataclass(frozen=True)
class Tiers:
    """The plans of a device and of the host memory below it; visits of both have the same numbers."""

    device: TopPlan
    host: Plan


def make_tiers(
    schedule: Schedule,
    rooms: tuple[int, int],
    policies: Sequence[RetentionPolicy] = POLICIES,
    *,
    slots: int | None = None,
    lookahead: int | None = None,
    align: int = ALIGN,
) -> Tiers:
    """Return the plans for (bytes on the device, bytes of host memory); arguments as of `make_plan`.

    Segments of `schedule` have their room in host memory, what a device holds of them, the seconds of a
    load and of a copy. Raises BudgetError naming the least of the tier that cannot hold two slots.
    """
    device_nbytes, host_nbytes = rooms
    above = device_schedule(schedule, frozenset())
    device = make_plan(above, device_nbytes, policies, slots=slots, lookahead=lookahead, align=align)
    try:
        host = make_plan(host_schedule(schedule, device), host_nbytes, policies, slots=slots, align=align)
    except BudgetError:
        # What the device leaves to pass through may be larger two by two than all of it, in its order, is.
        device = make_plan(above, device_nbytes, [NONE], slots=slots, lookahead=lookahead, align=align)
        host = make_plan(host_schedule(schedule, device), host_nbytes, policies, slots=slots, align=align)
    return joined(schedule, device, host)


def joined(schedule: Schedule, device: Plan, host: Plan) -> Tiers:
    """Return the plans of both tiers as one: what host memory does not keep is as slow as the disk above."""
    missed = frozenset(
        (s, i)
        for s, (stage, planned) in enumerate(zip(host.schedule.stages, host.stages, strict=True))
        for i in stage.visited
        if i not in planned.layout.retained
    )
    above = device_schedule(schedule, missed)
    top = TopPlan(above, device.stages, device.arena_nbytes, device.lookahead, host=host, whole=schedule)
    return Tiers(top, host)


def device_schedule(schedule: Schedule, missed: frozenset[tuple[int, int]]) -> Schedule:
    """Return the schedule as a device has it: a load is a copy, or a read from disk of what is `missed`.

    `missed` are (stage, segment) that host memory does not keep.
    """

    def above(at: tuple[int, int], s: Segment) -> Segment:
        load_s = max(s.copy_s, s.load_s) if at in missed else s.copy_s
        return replace(s, nbytes=s.copied_nbytes, load_s=load_s, read_nbytes=s.copied_nbytes)

    return Schedule(
        tuple(
            replace(stage, segments=tuple(above((n, i), s) for i, s in enumerate(stage.segments)))
            for n, stage in enumerate(schedule.stages)
        )
    )


def host_schedule(schedule: Schedule, device: Plan) -> Schedule:
    """Return the schedule as the host's memory has it: what the device retains is visited once."""

    def below(n: int, stage: Stage) -> Stage:
        kept = frozenset(device.stages[n].layout.retained)
        segments = tuple(replace(s, resident=False) for s in stage.segments)
        return replace(stage, segments=segments, once=kept)

    return Schedule(tuple(below(n, stage) for n, stage in enumerate(schedule.stages)))
