"""The plans of a session that computes on a device: what lies there, what in host memory, what on disk.

They are made at the start and again when a pass ran in another order. Room for activations is what example
inputs foretell, else a share of the budget; the allocator is held to the budget, so it cannot be broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blockstream.budget.governor import Governor, margin_nbytes
from blockstream.device.budget import DeviceBudget
from blockstream.device.rooms import DeviceLayout
from blockstream.device.upload import UploadStore
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.errors import ConfigError
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Observed, Plan, least_arena, make_plan
from blockstream.plan.retention import NONE, RetentionPolicy
from blockstream.plan.segments import Schedule, Stage
from blockstream.plan.tiers import Tiers, device_schedule, host_schedule, make_tiers

from .costs import default_costs
from .stage import StreamedStage

#: Bytes a second over a link, and operations a second, before anything has been measured.
LINK_SPEED = 50e9
DEVICE_FLOPS = 400e12
#: What the host holds beside weights for a forward that runs on a device.
HOST_ACTIVATIONS_NBYTES = 32 << 20


class DevicePlanning:
    """Makes the plans of a session on a device, as `Planning` does on the processor. Compute thread only."""

    def __init__(
        self,
        governor: Governor,
        budget: DeviceBudget,
        ledger: Ledger,
        policies: Sequence[RetentionPolicy],
        arena_nbytes: int | None = None,
        slots: int | None = None,
        lookahead: int | None = None,
        device_arena_nbytes: int | None = None,
    ) -> None:
        self._most_on_device = device_arena_nbytes
        self.governor, self.budget = governor, budget
        self._ledger, self._policies, self._most = ledger, policies, arena_nbytes
        self._slots, self._lookahead = slots, lookahead
        #: The plans last made.
        self.tiers: Tiers | None = None
        #: What passes learnt orders on; set once the engines run.
        self.store: UploadStore | None = None

    def first(self, stages: Sequence[StreamedStage]) -> Plan:
        """Return the first plan of the device; `tiers` has the host's beside it.

        Raises BudgetError, naming the least that would do, when nothing fits one of the two.
        """
        for s in stages:
            if s.around is not None:
                raise ConfigError(f"stage {s.name!r} has a store of its own and computes on no device")
            if s.activations_nbytes is None and s.rehearsal is not None:
                s.activations_nbytes = s.rehearsal.activations_nbytes
        activations = _activations(stages)
        rooms = self.budget.room(activations, self._most_on_device), self._host_room()
        for s in stages:
            self._cut_to_fit(s, rooms)
        schedule = Schedule.of([device_costs(s) for s in stages])
        largest = max((s for x in schedule.stages for s in x.segments), key=lambda s: s.nbytes)
        above = device_schedule(schedule, frozenset())
        least = least_arena(above, self._slots)
        if self._most_on_device is None or least <= self._most_on_device:
            self.budget.refuse(least, activations, (largest.name, largest.copied_nbytes))
        nothing = make_plan(above, least, [NONE], slots=self._slots)
        below = least_arena(host_schedule(schedule, nothing), self._slots)
        if self._most is None or below <= self._most:
            outside = self.governor.outside_nbytes + HOST_ACTIVATIONS_NBYTES
            self.governor.refuse(below, outside, (largest.name, largest.nbytes), self._slots or 2)
        room = max(rooms[1], below) if self._most is None else rooms[1]
        self.tiers = make_tiers(
            schedule, (rooms[0], room), self._policies, slots=self._slots, lookahead=self._lookahead
        )
        self.governor.follow()
        return self.tiers.device

    def activations_beside(self, stages: Sequence[StreamedStage], arena_nbytes: int) -> int:
        """Return the bytes of host memory that are kept free of weights beside an arena."""
        held = self.governor.outside_nbytes + HOST_ACTIVATIONS_NBYTES + arena_nbytes
        return HOST_ACTIVATIONS_NBYTES + margin_nbytes(held)

    def after_visit(self, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        """Account for a visit."""
        self.governor.sample(stage.name)

    def before_pass(
        self, stage: StreamedStage, engine: Engine, arena: Arena, first: bool, inputs_nbytes: int
    ) -> None:
        """Account for a pass that begins."""
        if first:
            self.governor.begin_stage()
        self.governor.begin_pass()

    def after_pass(self, stage: StreamedStage, engine: Engine, arena: Arena, reordered: bool) -> None:
        """Account for a pass, and plan anew where it ran in another order."""
        self.budget.sample()
        here = engine.cursor
        index = engine.plan.schedule.index(stage.name)
        if not reordered or self.tiers is None or here is None or here.stage != index:
            return
        assert self.store is not None
        self._ledger.compute.mark("outside")
        passes = engine.plan.schedule.stages[index].passes
        left = passes.expected - here.pass_index
        if passes.most is None:
            left = max(left, here.pass_index, 2)
        self.tiers = self._anew(stage, index, left, engine)
        if engine.can_adopt(self.tiers.device):
            self.store.adopt(self.tiers.host)
            engine.adopt(self.tiers.device)
            self._ledger.note("plan", plan_record(self.tiers.device))

    def resize(
        self, budget: int | str | None, stage: StreamedStage | None, engine: Engine, arena: Arena
    ) -> None:
        """Refuse: what is registered with a device keeps its size."""
        raise ConfigError("a session that runs on a device keeps the budget it started with; open another")

    def _cut_to_fit(self, stage: StreamedStage, rooms: tuple[int, int]) -> None:
        """Cut a stage into smaller segments when two of its own do not fit one of the two memories."""
        for parts in (2, 4, None):
            whole = Schedule.of([device_costs(stage)])
            above = device_schedule(whole, frozenset())
            resident = [s for s in whole.stages[0].segments if s.resident]
            below = replace(
                whole.stages[0],
                segments=tuple(replace(s, resident=False) for s in whole.stages[0].segments),
                once=frozenset(i for i, s in enumerate(whole.stages[0].segments) if s.resident),
            )
            fits = (
                least_arena(above, self._slots) <= rooms[0]
                and least_arena(Schedule((below,)), self._slots) <= rooms[1]
            )
            if fits:
                return
            room = min(rooms[0] - sum(s.copied_nbytes for s in resident), rooms[1])
            stage.install(finer=1 if parts is None else max(room // parts, 1))

    def _host_room(self) -> int:
        room = self.governor.weights_nbytes(self.governor.outside_nbytes + HOST_ACTIVATIONS_NBYTES)
        return room if self._most is None else min(room, self._most)

    def _anew(self, stage: StreamedStage, index: int, left: int, engine: Engine) -> Tiers:
        """Return the plans of what is left, in the order that ran; what is in memory stays."""
        assert self.tiers is not None and self.store is not None

        def reordered(schedule: Schedule) -> Schedule:
            stages = list(schedule.stages)
            stages[index] = replace(stages[index], order=stage.full_order)
            return Schedule.of(stages)

        device, host = self.store.arena.nbytes, self.store.pinned.arena.nbytes
        above = make_plan(
            reordered(engine.plan.schedule),
            device,
            self._policies,
            slots=self._slots,
            lookahead=self._lookahead,
            observed=Observed(engine.plan, index, left, engine.kept(), device),
        )
        below = self.store.host
        schedule = host_schedule(reordered(below.plan.schedule), above)
        seen = Observed(below.plan, index, left, below.kept(), host)
        return Tiers(above, make_plan(schedule, host, self._policies, slots=self._slots, observed=seen))


def device_costs(stage: StreamedStage) -> Stage:
    """Return a stage with what it costs on a device, as far as is known before it runs."""
    costs = default_costs(stage)
    layouts = {name: DeviceLayout.of(x) for name, x in stage.prepared.layouts.items()}
    speed = stage.known.compute_speed
    segments = []
    for s in costs.segments:
        flops = s.execute_s * speed if speed else 0.0
        copied = layouts[s.name].nbytes
        execute_s = flops / DEVICE_FLOPS if flops else copied / (2 * LINK_SPEED)
        segments.append(replace(s, execute_s=execute_s, copied_nbytes=copied, copy_s=copied / LINK_SPEED))
    return replace(costs, segments=tuple(segments))


def _activations(stages: Sequence[StreamedStage]) -> int | None:
    """Return the most that a forward is known to need; None where one is not known of."""
    known = [s.activations_nbytes for s in stages]
    return None if None in known else max((n for n in known if n is not None), default=0)
