"""The plans of a session that computes on a device: what lies there, what in host memory, what on disk.

They are made at the start and again when a pass ran in another order. Room for activations is what a
rehearsal foretells, else a share of the budget; the allocator is held to the budget, so it cannot be broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockstream.budget.ceiling import Ceiling
from blockstream.device.budget import DeviceBudget
from blockstream.device.protocol import Speeds
from blockstream.device.rooms import DeviceLayout
from blockstream.engine.ledger import Ledger
from blockstream.errors import ConfigError
from blockstream.module.faking import Call
from blockstream.module.prepared import Prepared
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Observed, least_arena, make_plan
from blockstream.plan.retention import NONE
from blockstream.plan.segments import Schedule, Stage
from blockstream.plan.tiers import Tiers, TopPlan, device_schedule, host_schedule, joined, make_tiers

from .asked import Asked
from .costs import default_costs
from .course import Course
from .declared import Declared
from .first import First, known_facts
from .stage_facts import Facts
from .tower import TowerTier


@dataclass(frozen=True)
class FirstOnDevice(First):
    """The first plans of both tiers; `plan` is the device's.

    `device_activations_nbytes` is what a forward is known to need there, None where one is not known of.
    """

    tiers: Tiers
    device_activations_nbytes: int | None


class DevicePlans:
    """Holds both tiers and plans for them. Compute thread only."""

    def __init__(
        self,
        tier: TowerTier,
        ceiling: Ceiling,
        budget: DeviceBudget,
        ledger: Ledger,
        asked: Asked,
        first: FirstOnDevice,
        stages: Sequence[Declared],
    ) -> None:
        self.tier, self._engine, self._store = tier, tier.engine, tier.below.store
        self._ceiling, self._budget, self._ledger, self._asked = ceiling, budget, ledger, asked
        self.facts: dict[str, Facts] = {f.name: f for f in first.facts}
        self._courses = {s.name: Course(s) for s in stages}

    def start(self, stage: str) -> None:
        """Register host memory with the device and begin to read."""
        self.tier.start()

    def before_pass(self, stage: str, call: Call, path: str, first: bool) -> None:
        """Account for a pass that begins."""
        if first:
            self._ceiling.begin_stage()
        self._ceiling.begin_pass()

    def after_visit(self, stage: str, part: int) -> None:
        """Account for a visit."""
        self._ceiling.sample(stage)

    def after_pass(self, stage: str, ran: Sequence[int], pass_index: int) -> None:
        """Account for a pass, and plan anew where it ran in another order."""
        self._budget.sample()
        self.tier.below.track.resolve()
        self.facts[stage], reordered = self._courses[stage].learn(self.facts[stage], ran, pass_index)
        here, index = self._engine.cursor, self._engine.plan.schedule.index(stage)
        if not reordered or here is None or here.stage != index:
            return
        self._ledger.compute.mark("outside")
        passes = self._engine.plan.schedule.stages[index].passes
        left = passes.expected - here.pass_index
        if passes.most is None:
            left = max(left, here.pass_index, 2)
        tiers = self._anew(stage, index, left)
        if self._engine.can_adopt(tiers.device):
            self._store.adopt(tiers.host)
            self._engine.adopt(tiers.device)
            self._ledger.note("plan", plan_record(tiers.device))

    def resize(self, idle: str | None) -> None:
        """Refuse: what is registered with a device keeps its size."""
        raise ConfigError("a session that runs on a device keeps the budget it started with; open another")

    @property
    def foresees(self) -> bool:
        """Return whether what a pass needs has to be known before it computes."""
        return False

    def needs_more(self) -> bool:
        """Return that nothing is given back: what is registered keeps its size."""
        return False

    def _anew(self, stage: str, index: int, left: int) -> Tiers:
        """Return the plans of what is left, in the order that ran; what is in memory stays."""

        def reordered(schedule: Schedule) -> Schedule:
            stages = list(schedule.stages)
            stages[index] = replace(stages[index], order=self.facts[stage].full_order)
            return Schedule.of(stages)

        device, host = self._store.arena.nbytes, self._store.pinned.arena.nbytes
        policies, slots = self._asked.policies, self._asked.slots
        before = self._engine.plan
        assert isinstance(before, TopPlan)
        whole = reordered(before.whole)
        above = make_plan(
            reordered(before.schedule),
            device,
            policies,
            slots=slots,
            lookahead=self._asked.lookahead,
            observed=Observed(before, index, left, self._engine.kept(), device),
        )
        below = self._store.host
        schedule = host_schedule(reordered(below.plan.schedule), above)
        seen = Observed(below.plan, index, left, below.kept(), host)
        return joined(whole, above, make_plan(schedule, host, policies, slots=slots, observed=seen))


def first_on_device(
    stages: Sequence[Declared], ceiling: Ceiling, budget: DeviceBudget, asked: Asked, variant: str = ""
) -> FirstOnDevice:
    """Return the first plans of both tiers.

    Raises BudgetError, naming the least that would do, when nothing fits one of the two.
    """
    for s in stages:
        if s.around is not None:
            raise ConfigError(f"stage {s.name!r} has a store of its own and computes on no device")
    facts = [known_facts(stage, variant, asked.measuring) for stage in stages]
    speeds = budget.device.speeds
    activations = _activations(facts)
    outside, beside = ceiling.outside_nbytes, budget.device.host_nbytes
    host_room = asked.room(ceiling.weights_nbytes(outside + beside))
    rooms = budget.room(activations, asked.device_arena_nbytes), host_room
    for i, s in enumerate(stages):
        facts[i] = _cut_to_fit(facts[i], s.prepared, rooms, asked.slots, speeds)
    schedule = Schedule.of([device_costs(f, speeds) for f in facts])
    largest = max((s for x in schedule.stages for s in x.segments), key=lambda s: s.nbytes)
    above = device_schedule(schedule, frozenset())
    least = least_arena(above, asked.slots)
    if asked.device_arena_nbytes is None or least <= asked.device_arena_nbytes:
        budget.refuse(least, activations, (largest.name, largest.copied_nbytes))
    nothing = make_plan(above, least, [NONE], slots=asked.slots)
    below = least_arena(host_schedule(schedule, nothing), asked.slots)
    if asked.arena_nbytes is None or below <= asked.arena_nbytes:
        named = (largest.name, largest.nbytes)
        ceiling.refuse(below, outside + beside, named, asked.slots or 2)
    room = max(host_room, below) if asked.arena_nbytes is None else host_room
    tiers = make_tiers(
        schedule, (rooms[0], room), asked.policies, slots=asked.slots, lookahead=asked.lookahead
    )
    return FirstOnDevice(tiers.device, tuple(facts), room, False, outside, beside, tiers, activations)


def _cut_to_fit(
    facts: Facts, prepared: Prepared, rooms: tuple[int, int], slots: int | None, speeds: Speeds
) -> Facts:
    """Return a stage cut finer when two of its segments do not fit one of the two memories."""
    for parts in (2, 4, None):
        whole = Schedule.of([device_costs(facts, speeds)])
        segments = whole.stages[0].segments
        below = replace(
            whole.stages[0],
            segments=tuple(replace(s, resident=False) for s in segments),
            once=frozenset(i for i, s in enumerate(segments) if s.resident),
        )
        above = least_arena(device_schedule(whole, frozenset()), slots)
        if above <= rooms[0] and least_arena(Schedule((below,)), slots) <= rooms[1]:
            break
        room = min(rooms[0] - sum(s.copied_nbytes for s in segments if s.resident), rooms[1])
        facts = facts.recut(prepared, 1 if parts is None else max(room // parts, 1))
    return facts


def device_costs(facts: Facts, speeds: Speeds) -> Stage:
    """Return a stage with what it costs on a device, as far as is known before it runs."""
    costs = default_costs(facts)
    layouts = {name: DeviceLayout.of(x) for name, x in facts.cut.layouts.items()}
    counted = {} if facts.rehearsal is None else facts.rehearsal.flops
    entries = {part.name: part.entry for part in facts.cut.parts}
    segments = []
    for s in costs.segments:
        flops = counted.get(entry, 0.0) if (entry := entries[s.name]) else 0.0
        copied = layouts[s.name].nbytes
        execute_s = flops / speeds.flops if flops else copied / (2 * speeds.link)
        segments.append(replace(s, execute_s=execute_s, copied_nbytes=copied, copy_s=copied / speeds.link))
    return replace(costs, segments=tuple(segments))


def _activations(facts: Sequence[Facts]) -> int | None:
    """Return the most that a forward is known to need; None where one is not known of."""
    known = [f.activations_nbytes for f in facts]
    return None if None in known else max((n for n in known if n is not None), default=0)
