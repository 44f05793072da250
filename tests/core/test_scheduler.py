"""Whatever compute does, the scheduler keeps extents apart and never brings compute to a halt."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from blockstream.errors import EngineError
from blockstream.extents import LiveExtents
from blockstream.layout import lay_out_stage
from blockstream.loads import State
from blockstream.plan import Plan, StagePlan, least_arena, make_plan
from blockstream.retention import NONE, POLICIES, PREFIX, SPREAD
from blockstream.scheduler import Scheduler
from blockstream.segments import AtMost, Exactly, Extent, Schedule, Segment, Stage, Unknown, Visit

from ..support.fakes import UNIT, schedule, stage

# -- a random walk -------------------------------------------------------------------------------

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


# -- single claims -------------------------------------------------------------------------------


def fresh(*stages, units=8, policy=NONE, **options):
    return Scheduler(make_plan(schedule(*stages), units * UNIT, [policy], **options))


def load_all(scheduler):
    """Start and end every load that may start; return what was loaded."""
    done = []
    while (load := scheduler.next_load()) is not None:
        scheduler.loaded(load)
        done.append(load.segment.name)
    return done


def go(scheduler, at, segment):
    """Compute one segment; return its visit."""
    visit = scheduler.locate(at, segment)
    if visit is None:
        visit, _ = scheduler.detour(at, segment)
    else:
        scheduler.skip_to(visit)
    while scheduler.acquire(visit) is None:
        scheduler.loaded(scheduler.next_load())
    scheduler.release(visit)
    return visit


@pytest.mark.parametrize("seed", range(20))
def test_free_extents_are_found_as_by_looking_at_every_one(seed):
    rng = random.Random(seed)
    known, every = LiveExtents(), []
    for _ in range(200):
        extent = Extent(rng.randrange(40), rng.randrange(6))
        free = extent.nbytes == 0 or not any(x.overlaps(extent) for x in every)
        assert known.is_free(extent) == free
        if free:
            known.add(extent)
            every.append(extent)
        elif rng.random() < 0.5:
            known.remove(every.pop(rng.randrange(len(every))))


def test_a_visit_past_the_end_of_an_open_pass_is_unplanned_and_of_that_pass():
    scheduler = fresh(stage(sizes=(1,) * 3, passes=3))
    assert scheduler.begin_pass(0) == 0
    for i in (0, 2):
        go(scheduler, 0, i)
    assert scheduler.cursor == Visit(0, 1, 0)
    assert go(scheduler, 0, 1) == Visit(0, 0, 3 + 1)
    scheduler.end_pass(0, 0)
    assert scheduler.begin_pass(0) == 1
    assert go(scheduler, 0, 1) == Visit(0, 1, 1)


def test_without_a_pass_begun_the_next_pass_follows_by_itself():
    scheduler = fresh(stage(sizes=(1,) * 2, passes=2))
    assert [go(scheduler, 0, i) for i in (0, 1, 0, 1)] == [Visit(0, p, i) for p in (0, 1) for i in (0, 1)]
    assert scheduler.cursor is None and not scheduler.live


def test_what_was_prefetched_for_visits_passed_over_is_freed():
    scheduler = fresh(stage(sizes=(1,) * 6), units=3, slots=3)
    assert load_all(scheduler) == ["s.0", "s.1", "s.2"]
    assert [x.segment.name for x in scheduler.skip_to(Visit(0, 0, 2))] == ["s.0", "s.1"]


def test_a_retained_segment_whose_last_visit_is_passed_over_goes_with_the_stage():
    scheduler = fresh(stage("a", sizes=(1,) * 3), stage("b", sizes=(1,) * 3), units=3, policy=PREFIX)
    load_all(scheduler)
    for i in (0, 2):
        go(scheduler, 0, i)
    assert not [x for x in scheduler.live if x.visit.stage == 0]
    assert go(scheduler, 1, 0) == Visit(1, 0, 0)


def test_a_call_after_the_last_pass_leaves_nothing_of_its_stage():
    scheduler = fresh(
        stage("a", sizes=(1,) * 3, passes=2), stage("b", sizes=(1,) * 3), units=3, policy=PREFIX
    )
    for _ in range(2):
        for i in range(3):
            go(scheduler, 0, i)
    assert go(scheduler, 0, 1).position == 3 + 1
    assert not [x for x in scheduler.live if x.visit.stage == 0]
    for i in range(3):
        go(scheduler, 1, i)


def test_a_load_in_flight_of_a_stage_that_ended_is_dropped_and_its_room_kept_until_it_ends():
    scheduler = fresh(stage("a", sizes=(2,) * 2), stage("b", sizes=(2,) * 2), units=4, slots=2)
    first = scheduler.next_load()
    assert scheduler.end_stage(0) == [] and list(scheduler.live.values()) == [State.DROPPED]
    assert scheduler.next_load() is None, "its room is still being read into"
    assert scheduler.loaded(first) is False
    assert load_all(scheduler) == ["b.0", "b.1"]


def test_what_compute_holds_in_the_way_of_a_load_is_named():
    scheduler = fresh(stage(sizes=(1,) * 4), units=2, slots=2)
    load_all(scheduler)
    for i in range(2):
        scheduler.acquire(Visit(0, 0, i))
    assert scheduler.in_the_way(Visit(0, 0, 2)).name == "s.0"
    scheduler.release(Visit(0, 0, 0))
    assert scheduler.in_the_way(Visit(0, 0, 2)) is None


def test_use_out_of_order_is_an_error():
    scheduler = fresh(stage(sizes=(1,) * 4, passes=2))
    load_all(scheduler)
    with pytest.raises(EngineError, match="not the next visit"):
        scheduler.acquire(Visit(0, 0, 1))
    with pytest.raises(EngineError, match="was not acquired"):
        scheduler.release(Visit(0, 0, 0))
    scheduler.acquire(Visit(0, 0, 0))
    with pytest.raises(EngineError, match=r"'s' is ended while its segment 's.0' is in use"):
        scheduler.end_stage(0)
    with pytest.raises(EngineError, match="cannot skip"):
        scheduler.skip_to(Visit(0, 0, 0))


def test_a_segment_in_use_is_not_handed_out_again():
    scheduler = fresh(stage(sizes=(1,) * 4, passes=2), units=4, policy=SPREAD)
    load_all(scheduler)
    scheduler.acquire(Visit(0, 0, 0))
    visit, _ = scheduler.detour(0, 0)
    with pytest.raises(EngineError, match=r"'s.0' is already in use"):
        scheduler.acquire(visit)


def test_a_plan_of_other_segments_or_amid_a_pass_of_another_order_is_refused():
    scheduler = fresh(stage(sizes=(1,) * 4, passes=2))
    with pytest.raises(EngineError, match="other segments"):
        scheduler.adopt(make_plan(schedule(stage(sizes=(1,) * 5)), 8 * UNIT))
    go(scheduler, 0, 0)
    turned = make_plan(schedule(stage(sizes=(1,) * 4, passes=2, order=(3, 2, 1, 0))), 8 * UNIT)
    with pytest.raises(EngineError, match="at visit 1 of a pass"):
        scheduler.adopt(turned)
    scheduler.end_pass(0, 0)
    scheduler.adopt(turned)
    assert go(scheduler, 0, 3) == Visit(0, 1, 0)


def test_a_segment_in_use_does_not_keep_what_its_finished_stage_left_behind():
    one, two = stage("a", sizes=(1,) * 3), stage("b", sizes=(2, 1))
    scheduler = fresh(one, two, units=3, policy=PREFIX)
    assert scheduler.plan.extent(Visit(1, 0, 0)).overlaps(scheduler.plan.extent(Visit(0, 0, 1)))
    load_all(scheduler)
    go(scheduler, 0, 0)
    held = Visit(0, 0, 2)
    scheduler.skip_to(held)
    scheduler.acquire(held)  # the last of its stage; a.1, passed over, is still there
    assert go(scheduler, 1, 0) == Visit(1, 0, 0)
    assert [x.segment.name for x in scheduler.release(held)] == ["a.2"]


def laid_out(*layouts, units):
    """Return a plan with its stages laid out by hand."""
    stages = tuple(stage for stage, _ in layouts)
    plans = tuple(StagePlan("by hand", 2, layout) for _, layout in layouts)
    return Plan(Schedule(stages), plans, units * UNIT)


def test_a_later_stages_head_does_not_keep_the_running_one_from_another_plan():
    one, two = stage("a", sizes=(1,) * 2, passes=2), stage("b", sizes=(1,) * 2)
    head = lay_out_stage(two, (0, 1), 2).mirrored(4 * UNIT)
    scheduler = Scheduler(laid_out((one, lay_out_stage(one, (0, 1), 2)), (two, head), units=4))
    assert load_all(scheduler) == ["a.0", "a.1", "b.0", "b.1"]
    for i in range(2):
        go(scheduler, 0, i)
    streamed = lay_out_stage(one, (), 2).mirrored(4 * UNIT)
    scheduler.adopt(laid_out((one, streamed), (two, head), units=4))
    assert [go(scheduler, 0, i).pass_index for i in range(2)] == [1, 1]


def test_what_was_read_for_a_later_visit_does_not_keep_an_earlier_one_from_another_plan():
    one = stage(sizes=(1,) * 2)
    scheduler = Scheduler(laid_out((one, lay_out_stage(one, (), 2)), units=2))
    assert load_all(scheduler) == ["s.0", "s.1"]
    single = lay_out_stage(one, (), 1).mirrored(2 * UNIT)
    assert single.extent(0, 0) == single.extent(0, 1) == scheduler.plan.extent(Visit(0, 0, 1))
    scheduler.adopt(laid_out((one, single), units=2))
    assert [go(scheduler, 0, i).position for i in range(2)] == [0, 1]
