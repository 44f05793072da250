"""What the scheduler loads, frees and refuses, one claim at a time."""

from __future__ import annotations

import random

import pytest

from blockstream.errors import EngineError
from blockstream.plan.arrangement import StagePlan
from blockstream.plan.extents import LiveExtents
from blockstream.plan.layout import lay_out_stage
from blockstream.plan.loads import State
from blockstream.plan.planner import Plan, make_plan
from blockstream.plan.retention import NONE, PREFIX, SPREAD
from blockstream.plan.scheduler import Scheduler
from blockstream.plan.segments import Extent, Schedule, Visit
from tests.support.fakes import UNIT, schedule, stage


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
