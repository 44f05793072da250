"""The plans of one session: the first, and those that follow what was measured and the memory there is.

Until each kind of block of a stage has run once, and no rehearsal has told, nobody knows what compute needs:
half of what the plan could hold beyond the least is left free; the rest is loaded then, and the plan is
completed. From then on it shrinks between visits, when activations, a cache or another process take memory,
and grows between passes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from blockstream.budget.ceiling import Ceiling
from blockstream.engine.ledger import Ledger
from blockstream.module.faking import Call
from blockstream.module.forked import may_fork
from blockstream.module.rehearsal import needs_imports
from blockstream.plan.layout import align_up
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Observed, Plan, least_arena, remaining, together
from blockstream.plan.segments import Extent, Schedule
from blockstream.system.limits import cpu_count

from .asked import Asked
from .costs import measured_costs
from .course import Course
from .declared import Declared
from .first import First
from .host_tier import HostTier
from .needs import LARGER, REHEARSAL_NBYTES
from .stage_facts import Facts

log = logging.getLogger(__name__)

#: A new plan replaces one that is running if what is left takes this much less time, or reads so much less.
GAIN = 0.03


class Replanner:
    """Holds the tier of a session, and is the only one that plans for it. Compute thread only.

    `facts` by stage are what is known now.
    """

    def __init__(
        self,
        tier: HostTier,
        ceiling: Ceiling,
        ledger: Ledger,
        asked: Asked,
        first: First,
        stages: Sequence[Declared],
    ) -> None:
        self.tier, self._engine, self._arena = tier, tier.engine, tier.arena
        self._shelves = tier.shelves
        self._ceiling, self._ledger, self._asked = ceiling, ledger, asked
        self.facts: dict[str, Facts] = {f.name: f for f in first.facts}
        self._courses = {s.name: Course(s) for s in stages}
        for s in stages:
            if s.inputs is not None:
                self._courses[s.name].needs.know(s.inputs, self.facts[s.name].rehearsal)
        self._limit = first.room_nbytes
        self._frugal = first.frugal
        self._resized = False
        self._warned = False

    def start(self, stage: str) -> None:
        """Commit what the first stage may use, and begin to read."""
        self._hold_back(stage)
        self._commit(stage, self._engine.most_nbytes)
        self._engine.start()

    # -- passes ------------------------------------------------------------------------------

    def before_pass(self, stage: str, call: Call, path: str, first: bool) -> None:
        """Make room for what the inputs of a pass will need, before it computes.

        Raises BudgetError, naming the least that would do, when an explicit budget would be exceeded.
        """
        if first:
            self._ceiling.begin_stage()
            self._engine.trim(self._keep)
            self._keep_together(stage)
            self._hold_back(stage)
        self._ceiling.begin_pass()
        facts, course = self.facts[stage], self._courses[stage]
        course.begin_pass()
        larger = course.needs.larger(call, path)
        need = None
        if self.foresees:
            can_hold = partial(self._can_hold, stage)
            need = course.needs.foresee(call, path, self._fits, can_hold, self._may_rehearse)
            self._ceiling.begin_pass()
        if need is None:
            if larger > LARGER:
                self.facts[stage] = replace(facts, completed=False)
                self._expect(stage, int(self._ceiling.activations_nbytes * larger))
            return
        if need.certain_nbytes:
            rest = Schedule(self._engine.plan.schedule.stages[self._index(stage) :])
            self._ceiling.require(stage, self._least(rest), need.certain_nbytes)
        enough = need.certain_nbytes if need.certain_nbytes and larger <= LARGER else need.nbytes
        if (first and self._frugal) or not self._fits(enough):
            self._expect(stage, need.nbytes)

    def after_visit(self, stage: str, part: int) -> None:
        """Account for a visit: shrink if memory has become short, complete the first plan if it may be."""
        facts, course = self.facts[stage], self._courses[stage]
        course.visited(facts, part)
        known = facts.completed or course.is_known(facts)
        self._ceiling.sample(stage, known)
        short = False
        if self._resized or self._ceiling.is_due() or self._ceiling.has_grown():
            short = self._is_short()
            if short:
                self._ceiling.relieve()
                self._fill_shelf(stage, slack=True)
                short = self._is_short()
            if not short:
                self._ceiling.follow()
        if short:
            self._shrink(stage)
        elif known and not facts.completed:
            self.facts[stage] = replace(facts, completed=True)
            if self._asked.arena_nbytes is None or self._limit < self._asked.arena_nbytes:
                self._complete(stage)
            self._let_go(stage)

    def after_pass(self, stage: str, ran: Sequence[int], pass_index: int) -> None:
        """Plan anew at a pass boundary: from the order that ran, the costs measured, the memory there is."""
        self.facts[stage], reordered = self._courses[stage].learn(self.facts[stage], ran, pass_index)
        index, here = self._index(stage), self._engine.cursor
        if here is None or here.stage != index:
            return
        facts = self.facts[stage]
        # Costs change with the inputs: they are looked at again after 1, 2, 4, 8, ... passes.
        due = not facts.measured or here.pass_index & (here.pass_index - 1) == 0
        self.facts[stage] = replace(facts, measured=True)
        if reordered or due or self._resized or self._has_grown(index):
            self._plan_anew(stage, reordered)
        self._fill_shelf(stage)

    def resize(self, idle: str | None) -> None:
        """Go on under a new budget: shrink now if stage `idle` is between visits, grow after this pass.

        Raises BudgetError when it cannot hold the least.
        """
        here, schedule = self._engine.cursor, self._engine.plan.schedule
        rest = Schedule(schedule.stages[here.stage if here is not None else -1 :])
        largest = max((s for x in rest.stages for s in x.segments), key=lambda s: s.nbytes)
        if self._ceiling.explicit:
            least, outside = self._least(rest), self._ceiling.outside_nbytes
            self._ceiling.refuse(least, outside, (largest.name, largest.nbytes), self._asked.slots or 2)
        self._resized = True
        self._warned = False
        if idle is not None and self._planned_nbytes > self._ceiling.weights_nbytes():
            self._shrink(idle)

    @property
    def foresees(self) -> bool:
        """Return whether what a pass needs has to be known before it computes."""
        return self._ceiling.explicit

    def needs_more(self) -> bool:
        """Return whether a stage that runs without hooks has to give memory back. Any thread."""
        return self._ceiling.is_due(settled=True) and self._is_short()

    # -- room --------------------------------------------------------------------------------

    def _index(self, stage: str) -> int:
        return self._engine.plan.schedule.index(stage)

    def _is_at(self, stage: str) -> bool:
        here = self._engine.cursor
        return here is not None and here.stage == self._index(stage)

    def _keep(self, extents: Iterable[Extent]) -> None:
        """Give back what neither these extents of plans nor shelves need."""
        self._arena.keep([*extents, *self._shelves.extents])

    @property
    def _planned_nbytes(self) -> int:
        return self._engine.plan.arena_nbytes + self._shelves.nbytes

    def _least(self, rest: Schedule) -> int:
        """Return the bytes of weights that some stages cannot do without."""
        return least_arena(rest, self._asked.slots) + self._shelves.least_nbytes

    def _is_short(self) -> bool:
        return self._planned_nbytes > self._ceiling.weights_nbytes(slack=True)

    def _fill_shelf(self, stage: str, slack: bool = False) -> None:
        """Give what a plan leaves to the experts used last."""
        if self._shelves.nbytes:
            room = self._asked.room(self._ceiling.weights_nbytes(slack=slack))
            self._shelves.resize(stage, room - self._engine.plan.arena_nbytes)

    def _fits(self, activations_nbytes: int) -> bool:
        """Return whether a pass that takes so much leaves the plan as it is."""
        outside = max(self._ceiling.pass_base_nbytes + activations_nbytes, self._ceiling.outside_nbytes)
        return self._planned_nbytes <= self._ceiling.weights_nbytes(outside, slack=True)

    def _can_hold(self, stage: str, activations_nbytes: int) -> bool:
        """Return whether there would be room for a pass that takes so much beside the least that it needs."""
        rest = Schedule(self._engine.plan.schedule.stages[self._index(stage) :])
        outside = self._ceiling.pass_base_nbytes + activations_nbytes
        return self._least(rest) <= self._ceiling.weights_nbytes(outside)

    def _may_rehearse(self) -> bool:
        """Return whether a rehearsal keeps to the budget, once what the heap keeps has been given back.

        One in a process of its own takes nothing of it.
        """
        if needs_imports():
            return may_fork()
        self._ceiling.relieve()
        self._ceiling.begin_pass()
        outside = self._ceiling.pass_base_nbytes + REHEARSAL_NBYTES
        return self._arena.touched_nbytes <= self._ceiling.weights_nbytes(outside, slack=True)

    def _expect(self, stage: str, activations_nbytes: int) -> None:
        self._ceiling.expect(activations_nbytes)
        if self._is_short():
            self._fill_shelf(stage, slack=True)
        if self._is_short():
            self._shrink(stage)

    def _room(self) -> int:
        """Return the bytes that a plan may take, beside the least for experts."""
        return self._asked.room(self._ceiling.weights_nbytes()) - self._shelves.least_nbytes

    def _has_grown(self, index: int) -> bool:
        """Return whether there is room for a segment more of a stage, and still is at a second look."""
        more = self._engine.plan.arena_nbytes + _smallest_left(self._engine.plan, index)
        if self._room() <= more:
            return False
        self._ceiling.look_again()
        return self._room() > more

    def _hold_back(self, stage: str) -> None:
        """Leave room for what a stage's blocks may need, as long as that is not known."""
        facts, index = self.facts[stage], self._index(stage)
        least = least_arena(Schedule(self._engine.plan.schedule.stages[index : index + 1]), self._asked.slots)
        unknown = not facts.completed and facts.rehearsal is None and self._limit != self._asked.arena_nbytes
        self._engine.hold_back(least + max(0, self._limit - least) // 2 if unknown else None)

    def _commit(self, stage: str, most: int | None = None) -> None:
        """Commit what a stage is to use, up to `most` bytes, before it is read into.

        In pieces, each after a look at what there is: what is free when a plan is made may be gone before
        it is taken. When it is, the plan shrinks.
        """
        if self.facts[stage].has_own_store:
            return  # its own store may hold its segments elsewhere
        before = -1
        while before != (before := self._engine.plan.arena_nbytes):
            layout = self._engine.plan.stages[self._index(stage)].layout

            def may() -> bool:
                self._ceiling.look_again()
                return not self._is_short() and (most is None or self._arena.touched_nbytes < most)

            if self._arena.commit(layout.extents, cpu_count().threads, may) or not self._is_short():
                return
            self._shrink(stage)

    def _let_go(self, stage: str) -> None:
        """Load whatever the plan has room for, once that is committed."""
        self._commit(stage)
        self._engine.hold_back(None)

    # -- plans -------------------------------------------------------------------------------

    def _plan_anew(self, stage: str, reordered: bool) -> None:
        """Adopt a plan from the measured costs, where one must or pays."""
        room = self._room()
        self.facts[stage] = replace(self.facts[stage], completed=True)
        if self._engine.most_nbytes is not None:
            self._let_go(stage)
        if self._keeps_all():
            if reordered:
                now = replace(self._engine.plan, schedule=self._measured(stage, reordered))
                self._adopt(together(now, now.arena_nbytes) or now, stage)
            return
        self._ledger.compute.mark("outside")
        schedule, index = self._measured(stage, reordered), self._index(stage)
        least, most = (
            least_arena(Schedule(schedule.stages[index:]), self._asked.slots),
            self._asked.arena_nbytes,
        )
        if most is not None and least > most:
            log.warning(
                "stage %r keeps its plan: in the order it ran the least arena is %d bytes, it has %d",
                *(stage, least, most),
            )
            return
        self._limit = max(room, least)
        observed, running = self._observe(index), self._engine.plan
        plan = self._asked.plan(schedule, self._limit, self._ceiling.explicit, observed)
        must = reordered or plan.arena_nbytes > running.arena_nbytes > self._limit or self._resized
        if must or _pays(plan, replace(running, schedule=schedule), observed):
            self._resized = False
            self._adopt(plan, stage)

    def _keeps_all(self) -> bool:
        """Return whether all of every stage stays, and there still is room for it."""
        return self._engine.plan.keeps and self._engine.plan.arena_nbytes <= self._room()

    def _keep_together(self, stage: str) -> None:
        """Keep all of every stage from now on, where stages are called in turn again and all fit."""
        running = self._engine.plan
        if self._engine.rounds and not running.keeps and running.retains_all:
            plan = together(running, min(self._room(), self.tier.plannable_nbytes))
            if plan is not None:
                self._adopt(plan, stage)

    def _complete(self, stage: str) -> None:
        """Plan again if compute leaves room for a segment more, now that it has been measured."""
        self._ledger.compute.mark("outside")
        if not self._is_at(stage) or self._keeps_all():
            return
        self._ceiling.relieve()
        index = self._index(stage)
        if not self._has_grown(index):
            return
        schedule = self._measured(stage, reordered=False)
        self._limit = self._room()
        observed = self._observe(index)
        plan = self._asked.plan(schedule, self._limit, self._ceiling.explicit, observed)
        if _pays(plan, replace(self._engine.plan, schedule=schedule), observed):
            self._adopt(plan, stage)

    def _shrink(self, stage: str) -> None:
        """Retain less, between two visits."""
        self._ledger.compute.mark("outside")
        if not self._is_at(stage):
            return
        schedule, index = self._engine.plan.schedule, self._index(stage)
        least, room = least_arena(Schedule(schedule.stages[index:]), self._asked.slots), self._room()
        self._limit = max(room, least)
        if least > self._ceiling.weights_nbytes(slack=True) - self._shelves.least_nbytes and not self._warned:
            self._warned = True
            log.warning(
                "stage %r needs %d MiB for weights and memory leaves %d MiB: it goes on with the least",
                *(stage, least >> 20, max(0, room) >> 20),
            )
        if self._engine.plan.arena_nbytes > self._limit:
            observed = self._observe(index)
            self._adopt(self._asked.plan(schedule, self._limit, self._ceiling.explicit, observed), stage)
        self._fill_shelf(stage, slack=True)
        self._ceiling.follow(at_once=room < least)

    def _measured(self, stage: str, reordered: bool) -> Schedule:
        index, stages = self._index(stage), list(self._engine.plan.schedule.stages)
        stages[index] = measured_costs(stages[index], index, self._ledger)
        if reordered:
            stages[index] = replace(stages[index], order=self.facts[stage].full_order)
        return Schedule.of(stages)

    def _observe(self, index: int) -> Observed:
        here, plan = self._engine.cursor, self._engine.plan
        done = here.pass_index if here is not None else 0
        passes = plan.schedule.stages[index].passes
        left = passes.expected - done
        if passes.most is None:  # it has gone on so long: expect as much again
            left = max(left, done, 2)
        return Observed(plan, index, left, self._engine.kept(), self.tier.plannable_nbytes)

    def _adopt(self, plan: Plan, stage: str) -> None:
        if not self._engine.can_adopt(plan):
            return  # what is in use would have to move; the pass boundary plans again
        less = plan.arena_nbytes < self._engine.plan.arena_nbytes
        more = plan.arena_nbytes > self._engine.plan.arena_nbytes
        if more:
            self._engine.hold_back(0)
        self._engine.adopt(plan)
        self._engine.trim(self._keep, wait=less)
        if more:
            self._let_go(stage)
        self._ledger.note("plan", plan_record(plan))
        self._ceiling.follow()


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
