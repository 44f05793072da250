"""Whatever compute does, the scheduler keeps extents apart and never brings compute to a halt."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from blockstream.errors import EngineError
from blockstream.plan.loads import State
from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import POLICIES
from blockstream.plan.scheduler import Scheduler
from blockstream.plan.segments import AtMost, Exactly, Schedule, Segment, Stage, Unknown
from tests.support.fakes import UNIT

#: What compute and the loader do next, and how often.
ACTIONS = {
    "load_starts": 12,
    "load_ends": 12,
    "computes_next": 12,
    "computes_any": 3,
    "gives_up_any": 1,
    "takes_next": 2,
    "lets_go": 2,
    "begins_pass": 2,
    "ends_pass": 1,
    "ends_stage": 0.3,
    "adopts": 1,
}


class Walk:
    """A compute thread and a loader that take turns on one scheduler, and remember what they hold."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.steps = []
        self.schedule = Schedule(tuple(self.stage(name) for name in "abc"[: self.rng.randint(1, 3)]))
        self.room = least_arena(self.schedule) + self.rng.randint(0, 10) * UNIT
        self.scheduler = Scheduler(self.plan(self.schedule))
        self.now = 0
        self.open = None
        self.in_flight = None
        self.handles = set()
        self.held = []

    def stage(self, name):
        rng = self.rng
        segments = tuple(
            Segment(f"{name}.{i}", rng.randint(0, 4) * UNIT, 1.0, 1.0, resident=rng.random() < 0.1)
            for i in range(rng.randint(1, 7))
        )
        passes = rng.choice([Exactly, AtMost, Unknown])(rng.randint(1, 3))
        return Stage(name, segments, self.order(segments), passes)

    def order(self, segments):
        if self.rng.random() < 0.5:
            return tuple(range(len(segments)))
        return tuple(self.rng.choices(range(len(segments)), k=self.rng.randint(1, 9)))

    def plan(self, schedule):
        policy = self.rng.choice(POLICIES)
        room = max(self.room, least_arena(schedule))
        return make_plan(schedule, room, [policy], lookahead=self.rng.choice([None, None, 1]))

    # -- the loader ------------------------------------------------------------------------------

    def load_starts(self):
        if self.in_flight is None:
            self.in_flight = self.scheduler.next_load()

    def load_ends(self):
        load, self.in_flight = self.in_flight, None
        if load is not None and self.scheduler.loaded(load):
            self.handles.add(load)

    def free(self, loads):
        for load in loads:
            self.handles.remove(load)  # KeyError: released twice, or never loaded

    # -- compute ---------------------------------------------------------------------------------

    def seek(self, at, segment):
        cursor = self.scheduler.cursor
        if cursor is not None and cursor.stage < at:
            self.lets_go()
            self.free(self.scheduler.end_stage(at - 1))
        visit = self.scheduler.locate(at, segment)
        if visit is not None:
            self.free(self.scheduler.skip_to(visit))
            return visit
        visit, freed = self.scheduler.detour(at, segment)
        self.free(freed)
        return visit

    def compute(self, at, segment):
        visit = self.take(at, segment)
        self.check()
        for _ in range(self.rng.randint(0, 2)):
            self.load_starts()
            self.load_ends()
        self.free(self.scheduler.release(visit))

    def take(self, at, segment):
        """Acquire as the engine does. The load in flight ends, others start and end: that must suffice."""
        self.now = at
        if segment in [load.key[1] for load, _ in self.held if load.key[0] == at]:
            self.lets_go()
        visit = self.seek(at, segment)
        if self.scheduler.in_the_way(visit) is not None:
            assert self.held
            self.lets_go()
        assert self.scheduler.in_the_way(visit) is None
        for _ in range(100):
            load = self.scheduler.acquire(visit)
            if load is not None:
                break
            self.load_starts()
            self.load_ends()
        assert load is not None, f"{visit} is never loaded"
        assert load in self.handles and load.key == (at, segment)
        return visit

    def lets_go(self):
        """Release what is held, the last taken first."""
        while self.held:
            _, visit = self.held.pop()
            self.free(self.scheduler.release(visit))

    def takes_next(self):
        """Acquire the next segment and keep it while others are computed."""
        cursor = self.scheduler.cursor
        if cursor is not None:
            segment = self.scheduler.plan.schedule.stages[cursor.stage].index_at(cursor.position)
            visit = self.take(cursor.stage, segment)
            (load,) = (
                x
                for x, s in self.scheduler.live.items()
                if x.key == (cursor.stage, segment) and s is State.ACQUIRED
            )
            self.held.append((load, visit))

    def any_segment(self):
        return self.rng.randrange(len(self.schedule.stages[self.now].segments))

    def computes_next(self):
        cursor = self.scheduler.cursor
        if cursor is not None:
            planned = self.scheduler.plan.schedule.stages[cursor.stage]
            self.compute(cursor.stage, planned.index_at(cursor.position))

    def computes_any(self):
        self.compute(self.now, self.any_segment())

    def gives_up_any(self):
        self.seek(self.now, self.any_segment())

    def begins_pass(self):
        index = self.scheduler.begin_pass(self.now)
        self.open = None if index is None else (self.now, index)

    def ends_pass(self):
        if self.open is not None:
            self.lets_go()
            self.free(self.scheduler.end_pass(*self.open))
            self.open = None

    def ends_stage(self):
        self.lets_go()
        self.free(self.scheduler.end_stage(self.now))
        self.now = min(self.now + 1, len(self.schedule.stages) - 1)

    def adopts(self):
        """Adopt another plan, with another order where no pass is under way."""
        cursor = self.scheduler.cursor
        stages = list(self.scheduler.plan.schedule.stages)
        if cursor is None or cursor.position == 0:
            old = stages[self.now]
            stages[self.now] = Stage(old.name, old.segments, self.order(old.segments), old.passes)
        plan = self.plan(Schedule(tuple(stages)))
        try:
            self.free(self.scheduler.adopt(plan))
        except EngineError:
            assert self.held, "only what is in use is in the way of a plan"
            self.check()
            self.lets_go()
            self.free(self.scheduler.adopt(plan))

    # -- what must hold --------------------------------------------------------------------------

    def check(self):
        live = self.scheduler.live
        extents = sorted(x.extent for x in live if x.extent.nbytes)
        assert all(a.end <= b.offset for a, b in pairwise(extents)), "live extents overlap"
        if self.in_flight is None:  # a read that was dropped may still fill the place of an older plan
            assert not extents or extents[-1].end <= self.scheduler.plan.arena_nbytes
        held = {x for x, state in live.items() if state in (State.READY, State.ACQUIRED)}
        assert held == self.handles, "what is live is what was handed out"

    def run(self, steps):
        for _ in range(steps):
            (action,) = self.rng.choices(list(ACTIONS), ACTIONS.values())
            self.steps.append(action)
            getattr(self, action)()
            self.check()

    def finish(self):
        """From wherever it is, compute can go through all that is planned; then nothing is left."""
        for _ in range(60):
            self.computes_next()
            self.check()
        self.lets_go()
        self.free(self.scheduler.end_stage(len(self.schedule.stages) - 1))
        self.load_ends()
        assert not self.handles and not self.scheduler.live


@pytest.mark.parametrize("block", range(10))
def test_compute_may_wander(block):
    for seed in range(80 * block, 80 * (block + 1)):
        walk = Walk(seed)
        try:
            walk.run(60)
            walk.finish()
        except Exception as error:
            error.add_note(f"seed {seed}, after {walk.steps}")
            raise
