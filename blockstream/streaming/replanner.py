"""The plans of one session: the first, and those that follow what was measured and the memory there is.

Until each kind of block of a stage has run once nobody knows what compute needs: half of what the plan
could hold beyond the least is left free, the rest is loaded then, and the plan completed. From then on it
shrinks between visits, when activations, a cache or another process take memory, and grows between passes.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from blockstream.budget.governor import Governor, margin_nbytes
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.errors import BudgetError
from blockstream.plan.layout import align_up
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Observed, Plan, least_arena, make_plan, remaining
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Schedule
from blockstream.system.limits import cpu_count
from blockstream.system.runtime_floor import RUNTIME_MODULES, runtime_floor

from .costs import default_costs, measured_costs
from .cuts import cut_to_fit, cut_to_gain

if TYPE_CHECKING:
    from .stage import StreamedStage

log = logging.getLogger(__name__)

#: Activations expected of a stage that nothing is known of.
ACTIVATIONS_NBYTES = 32 << 20
#: A budget this near the least asks for the runtime floor, which may have to be measured in a child.
TIGHT_NBYTES = 256 << 20
#: One this near the least has no room for what the heap keeps of freed activations.
FRUGAL_NBYTES = 128 << 20
#: A new plan replaces one that is running if what is left takes this much less time, or reads so much less.
GAIN = 0.03
#: Inputs larger than any before by this factor need more room than was seen.
LARGER = 1.1


class Planning:
    """Makes the plans of a session. Compute thread only."""

    def __init__(
        self,
        governor: Governor,
        ledger: Ledger,
        policies: Sequence[RetentionPolicy],
        arena_nbytes: int | None = None,
        slots: int | None = None,
        lookahead: int | None = None,
    ) -> None:
        self.governor = governor
        self._ledger = ledger
        self._policies = policies
        self._most = arena_nbytes
        self._slots = slots
        self._lookahead = lookahead
        self._limit = 0
        self._resized = False
        self._warned = False

    # -- before anything runs ----------------------------------------------------------------

    def first(self, stages: Sequence[StreamedStage]) -> Plan:
        """Return the first plan; stages are cut finer where the arena asks for it, or time is gained.

        Raises BudgetError, naming the least that would do, when nothing fits.
        """
        self.governor.frugal = False  # a draft may have come before
        outside = self._expected_outside(stages)
        room = self.governor.weights_nbytes(outside)
        if self._most is not None:
            room = min(room, self._most)
        for stage in stages:
            cut_to_fit(stage, room, self._slots)
            if self._slots is None and self._lookahead is None:
                cut_to_gain(stage, room, self._policies)
        schedule = Schedule.of([default_costs(s) for s in stages])
        least = least_arena(schedule, self._slots)
        if self._most is None or least <= self._most:
            largest = max((s for x in schedule.stages for s in x.segments), key=lambda s: s.nbytes)
            count = self._slots or min(2, sum(not s.resident for x in schedule.stages for s in x.segments))
            self.governor.refuse(least, outside, (largest.name, largest.nbytes), count)
            room = max(room, least)
            self.governor.frugal = room < least + FRUGAL_NBYTES
        self._limit = room
        self.governor.follow()
        return self._make(schedule)

    def activations_beside(self, stages: Sequence[StreamedStage], arena_nbytes: int) -> int:
        """Return the bytes that are kept free of weights beside an arena."""
        expected = _expected_activations(stages)
        return expected + margin_nbytes(self.governor.outside_nbytes + expected + arena_nbytes)

    def _expected_outside(self, stages: Sequence[StreamedStage]) -> int:
        """Return what will be held outside the arena: now, once all libraries are warm, and activations.

        Where "auto" leaves room for all weights, what compute needs is not found out beforehand.
        """
        schedule = Schedule.of([default_costs(s) for s in stages])
        most = max(x.nbytes for x in schedule.stages)
        free = self.governor.weights_nbytes(self.governor.outside_nbytes + ACTIVATIONS_NBYTES)
        if self.governor.explicit or free < most:
            for s in stages:
                if s.rehearsal is not None:
                    s.activations_nbytes = s.activations_nbytes or s.rehearsal.activations_nbytes
            gc.collect()  # what that left in cycles would be there in one start and not in another
            self.governor.relieve()
        now = self.governor.outside_nbytes  # what it took to find that out included
        activations = _expected_activations(stages)
        least = least_arena(schedule, self._slots)
        if self.governor.explicit and self.governor.weights_nbytes(now + activations) < least + TIGHT_NBYTES:
            now = max(now, _floor())
        return now + activations

    # -- while it runs -----------------------------------------------------------------------

    def hold_back(self, stage: StreamedStage, engine: Engine) -> None:
        """Leave room for what a stage's blocks may need, as long as it has not been measured."""
        index = engine.plan.schedule.index(stage.name)
        least = least_arena(Schedule(engine.plan.schedule.stages[index : index + 1]), self._slots)
        unknown = not stage.completed and stage.activations_nbytes is None and self._limit != self._most
        engine.hold_back(least + max(0, self._limit - least) // 2 if unknown else None)

    def commit(self, stage: StreamedStage, engine: Engine, arena: Arena, most: int | None = None) -> None:
        """Commit what a stage is to use, up to `most` bytes, before it is read into.

        In pieces, each after a look at what there is: what is free when a plan is made may be gone before
        it is taken. When it is, the plan shrinks.
        """
        if stage.around is not None:
            return  # its own store may hold its segments elsewhere
        before = -1
        while before != (before := engine.plan.arena_nbytes):
            layout = engine.plan.stages[engine.plan.schedule.index(stage.name)].layout

            def may() -> bool:
                self.governor.look_again()
                return not self._is_short(engine) and (most is None or arena.touched_nbytes < most)

            if arena.commit(layout.extents, cpu_count().threads, may) or not self._is_short(engine):
                return
            self._shrink(stage, engine, arena)

    def after_visit(self, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        """Account for a visit: shrink if memory has become short, complete the first plan if it may be."""
        known = stage.completed or stage.is_known()
        self.governor.sample(stage.name, known)
        short = False
        if self._resized or self.governor.is_due() or self.governor.has_grown():
            short = self._is_short(engine)
            if short:
                self.governor.relieve()
                short = self._is_short(engine)
            if not short:
                self.governor.follow()
        if short:
            self._shrink(stage, engine, arena)
        elif known and not stage.completed:
            stage.completed = True
            if self._most is None or self._limit < self._most:
                self._complete(stage, engine, arena)
            self._let_go(stage, engine, arena)

    def before_pass(
        self, stage: StreamedStage, engine: Engine, arena: Arena, first: bool, inputs_nbytes: int
    ) -> None:
        """Make room for inputs larger than any before: what compute needs grows with them."""
        if first:
            self.governor.begin_stage()
            engine.trim(arena.keep)
            self.hold_back(stage, engine)
        self.governor.begin_pass()
        if first and self.governor.frugal and stage.activations_nbytes is not None:
            self.governor.expect(stage.activations_nbytes)
            if self._is_short(engine):
                self._shrink(stage, engine, arena)
        before, stage.inputs_nbytes = stage.inputs_nbytes, max(stage.inputs_nbytes, inputs_nbytes)
        if before and inputs_nbytes > LARGER * before:
            stage.completed = False
            expected = int(self.governor.activations_nbytes * (inputs_nbytes / before))
            self.governor.expect(expected)
            if self._is_short(engine):
                self._shrink(stage, engine, arena)

    def resize(
        self, budget: int | str | None, stage: StreamedStage | None, engine: Engine, arena: Arena
    ) -> None:
        """Go on under another budget: shrink now if `stage` is between visits, grow after this pass.

        Raises BudgetError when an amount cannot hold the least, and nothing changes.
        """
        schedule = engine.plan.schedule
        here = engine.cursor
        rest = Schedule(schedule.stages[here.stage if here is not None else -1 :])
        largest = max((s for x in rest.stages for s in x.segments), key=lambda s: s.nbytes)
        before = self.governor.budget
        self.governor.relieve()
        self.governor.set(budget)
        try:
            if self.governor.explicit:
                least = least_arena(rest, self._slots)
                self.governor.refuse(
                    least, self.governor.outside_nbytes, (largest.name, largest.nbytes), self._slots or 2
                )
        except BudgetError:
            self.governor.set(before)
            raise
        self._resized = True
        self._warned = False
        if stage is not None and engine.plan.arena_nbytes > self.governor.weights_nbytes():
            self._shrink(stage, engine, arena)

    def after_pass(self, stage: StreamedStage, engine: Engine, arena: Arena, reordered: bool) -> None:
        """Plan anew at a pass boundary: from the order that ran, the costs measured, the memory there is."""
        index = engine.plan.schedule.index(stage.name)
        here = engine.cursor
        if here is None or here.stage != index:
            return
        first, stage.measured = not stage.measured, True
        grown = self._has_grown(engine, index)
        # Costs change with the inputs: they are looked at again after 1, 2, 4, 8, ... passes.
        due = first or here.pass_index & (here.pass_index - 1) == 0
        if not (reordered or due or self._resized or grown):
            return
        room = self._room(engine)
        stage.completed = True
        if engine.most_nbytes is not None:
            self._let_go(stage, engine, arena)
        self._ledger.compute.mark("outside")
        schedule = self._measured(stage, engine, reordered)
        least = least_arena(Schedule(schedule.stages[index:]), self._slots)
        if self._most is not None and least > self._most:
            log.warning(
                "stage %r keeps its plan: in the order it ran the least arena is %d bytes, it has %d",
                stage.name,
                least,
                self._most,
            )
            return
        self._limit = max(room, least)
        observed = self._observe(engine, arena, index)
        plan = self._make(schedule, observed)
        must = reordered or plan.arena_nbytes > engine.plan.arena_nbytes > self._limit or self._resized
        if not must and not _pays(plan, replace(engine.plan, schedule=schedule), observed):
            return
        self._resized = False
        self._adopt(plan, stage, engine, arena)

    def _is_short(self, engine: Engine) -> bool:
        return engine.plan.arena_nbytes > self.governor.weights_nbytes(slack=True)

    def _has_grown(self, engine: Engine, index: int) -> bool:
        """Return whether there is room for a segment more of a stage, and still is at a second look."""
        more = engine.plan.arena_nbytes + _smallest_left(engine.plan, index)
        if self._room(engine) <= more:
            return False
        self.governor.look_again()
        return self._room(engine) > more

    def _room(self, engine: Engine) -> int:
        room = self.governor.weights_nbytes()
        return room if self._most is None else min(room, self._most)

    def _complete(self, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        """Plan again if compute leaves room for a segment more, now that it has been measured."""
        self._ledger.compute.mark("outside")
        here = engine.cursor
        index = engine.plan.schedule.index(stage.name)
        if here is None or here.stage != index:
            return
        self.governor.relieve()
        if not self._has_grown(engine, index):
            return
        schedule = self._measured(stage, engine, reordered=False)
        self._limit = self._room(engine)
        observed = self._observe(engine, arena, index)
        plan = self._make(schedule, observed)
        if _pays(plan, replace(engine.plan, schedule=schedule), observed):
            self._adopt(plan, stage, engine, arena)

    def _shrink(self, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        """Retain less, between two visits."""
        self._ledger.compute.mark("outside")
        here = engine.cursor
        index = engine.plan.schedule.index(stage.name)
        if here is None or here.stage != index:
            return
        schedule = engine.plan.schedule
        least = least_arena(Schedule(schedule.stages[index:]), self._slots)
        room = self._room(engine)
        self._limit = max(room, least)
        if room < least and not self._warned:
            self._warned = True
            log.warning(
                "stage %r needs %d MiB for weights and memory leaves %d MiB: it goes on with the least",
                stage.name,
                least >> 20,
                max(0, room) >> 20,
            )
        if engine.plan.arena_nbytes > self._limit:
            self._adopt(self._make(schedule, self._observe(engine, arena, index)), stage, engine, arena)
        self.governor.follow(at_once=room < least)

    def _measured(self, stage: StreamedStage, engine: Engine, reordered: bool) -> Schedule:
        index = engine.plan.schedule.index(stage.name)
        stages = list(engine.plan.schedule.stages)
        stages[index] = measured_costs(stages[index], index, self._ledger)
        if reordered:
            stages[index] = replace(stages[index], order=stage.full_order)
        return Schedule.of(stages)

    def _observe(self, engine: Engine, arena: Arena, index: int) -> Observed:
        here = engine.cursor
        done = here.pass_index if here is not None else 0
        passes = engine.plan.schedule.stages[index].passes
        left = passes.expected - done
        if passes.most is None:  # it has gone on so long: expect as much again
            left = max(left, done, 2)
        return Observed(engine.plan, index, left, engine.kept(), arena.nbytes)

    def _make(self, schedule: Schedule, observed: Observed | None = None) -> Plan:
        """Return a plan within the limit; what is not asked for as an amount is used only where it pays.

        A plan made anew stays within the arena that there is.
        """
        make = partial(
            make_plan,
            schedule,
            self._limit if observed is None else min(self._limit, observed.end_nbytes),
            self._policies,
            slots=self._slots,
            lookahead=self._lookahead,
            observed=observed,
        )
        plan = make()
        if self.governor.explicit or self._most is not None or plan.retains_all:
            return plan
        return make(thrifty=True)

    def _adopt(self, plan: Plan, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        if not engine.can_adopt(plan):
            return  # what is in use would have to move; the pass boundary plans again
        less = plan.arena_nbytes < engine.plan.arena_nbytes
        more = plan.arena_nbytes > engine.plan.arena_nbytes
        if more:
            engine.hold_back(0)
        engine.adopt(plan)
        engine.trim(arena.keep, wait=less)
        if more:
            self._let_go(stage, engine, arena)
        self._ledger.note("plan", plan_record(plan))
        self.governor.follow()

    def _let_go(self, stage: StreamedStage, engine: Engine, arena: Arena) -> None:
        """Load whatever the plan has room for, once that is committed."""
        self.commit(stage, engine, arena)
        engine.hold_back(None)


def _expected_activations(stages: Sequence[StreamedStage]) -> int:
    known = (s.activations_nbytes for s in stages)
    return max((ACTIVATIONS_NBYTES if n is None else n for n in known), default=0)


def _floor() -> int:
    """Return what a process with the modules of this one holds once they have computed."""
    loaded = [m for m in RUNTIME_MODULES if m in sys.modules]
    try:
        return runtime_floor(loaded).nbytes
    except BudgetError as error:
        log.warning("%s", error)
        return 0


def _smallest_left(plan: Plan, index: int) -> int:
    """Return the bytes of the smallest segment of a stage that is not retained; all there is if none is."""
    stage, kept = plan.schedule.stages[index], plan.stages[index].layout.retained
    left = [align_up(stage.segments[i].nbytes) for i in stage.visited if i not in kept]
    return min(left, default=1 << 62)


def _pays(plan: Plan, running: Plan, observed: Observed) -> bool:
    """Return whether a plan is worth a change: much less time, or no more and fewer bytes read."""
    new, old = remaining(plan, observed), remaining(running, observed)
    less = new.wall_s <= 1.001 * old.wall_s and new.read_nbytes <= (1 - GAIN) * old.read_nbytes
    return less or new.wall_s <= (1 - GAIN) * old.wall_s
