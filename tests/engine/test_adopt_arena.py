"""A run that is planned anew for more or less memory keeps what it can where it is."""

from __future__ import annotations

import threading
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.errors import BudgetError, EngineError
from blockstream.plan.planner import Observed, least_arena, make_plan, remaining
from blockstream.plan.retention import POLICIES, PREFIX, SPREAD, adjust_spread
from blockstream.plan.segments import Exactly, Extent, Schedule, Unknown, Visit
from blockstream.plan.simulate import Estimate
from tests.support.examples import examples
from tests.support.fakes import UNIT, Gates, engine_on, schedule, stage
from tests.support.interleaving import WAIT, Waits, meanwhile
from tests.support.strategies import stages as any_stage


def seen(plan, kept, passes_left=3, end=1 << 40, at=0):
    return Observed(plan, at, passes_left, frozenset(kept), end)


def anew(plan, units, kept=None, slots=None, **more):
    kept = plan.stages[0].retained if kept is None else kept
    return make_plan(plan.schedule, units * UNIT, [SPREAD], slots=slots, observed=seen(plan, kept, **more))


def extents(layout):
    """Return all extents of a layout that may be in use at once: what is retained, and the slots as one."""
    slots = [x for one in (layout.first, *layout.streamed) for x in one]
    region = [] if not slots else [(layout.base, max(x.end for x in slots))]
    return [(x.offset, x.end) for x in layout.retained.values() if x.nbytes] + region


@st.composite
def replanned(draw):
    """A plan, what of it is there, and the plan for another arena."""
    one = Schedule((draw(any_stage()),))
    least = least_arena(one)
    first = make_plan(
        one, least + draw(st.integers(0, 12)) * UNIT, draw(st.sampled_from([POLICIES, (SPREAD,)]))
    )
    there = [i for i in first.stages[0].retained if draw(st.booleans())]
    second = make_plan(
        one,
        least + draw(st.integers(0, 12)) * UNIT,
        POLICIES,
        observed=seen(first, there, draw(st.integers(1, 9))),
    )
    return first, frozenset(there), second


@given(replanned())
@examples(300)
def test_what_is_kept_stays_where_it_is_and_nothing_overlaps(case):
    first, there, second = case
    before, after = first.stages[0].layout, second.stages[0].layout
    for i in there & after.retained.keys():
        assert after.retained[i] == before.retained[i]
    for (a, a_end), (b, b_end) in combinations(extents(after), 2):
        assert a_end <= b or b_end <= a
    assert sum(end - start for start, end in extents(after)) <= after.nbytes <= second.arena_nbytes
    assert all(end <= after.end for _, end in extents(after))


@given(replanned(), st.integers(0, 3))
@examples(200)
def test_a_kept_segment_is_not_read_again_and_memory_stays_within_both_plans(case, position):
    first, _, _ = case
    one = first.schedule.stages[0]
    names = [one.segments[i].name for i in one.order]
    loads: list[str] = []
    with engine_on(first) as (engine, store):

        def run(begin, end):
            for name in names[begin:end]:
                with engine.visit("s", name) as handle:
                    assert handle.name == name
                    in_use = sum(h.room.nbytes for h in list(store.live))
                    assert in_use <= max(first.arena_nbytes, engine.plan.arena_nbytes)

        at = min(position, len(names))
        if one.passes.most == 0:
            return
        engine.begin_pass("s")
        run(0, at)
        kept = {x.key[1] for x in engine._scheduler.live if x.retained}
        second = make_plan(
            first.schedule, case[2].arena_nbytes, POLICIES, observed=seen(first, kept, one.passes.expected)
        )
        engine.adopt(second)
        stays = {one.segments[i].name for i in kept & set(second.stages[0].retained)}
        before = len(store.loads)
        run(at, len(names))
        engine.end_pass("s", 0)
        loads = store.loads[before:]
        assert not stays & set(loads), "what is kept is in memory already"


@pytest.mark.parametrize("fewer", [9, 8, 6, 4, 2])
def test_a_smaller_arena_drops_some_and_reads_nothing_else_anew(fewer):
    plan = make_plan(schedule(stage(sizes=(1,) * 12, load=2, passes=20)), 10 * UNIT, [SPREAD], slots=2)
    smaller = anew(plan, fewer, passes_left=2)
    assert set(smaller.stages[0].retained) < set(plan.stages[0].retained)
    assert len(smaller.stages[0].retained) == fewer - 2
    assert smaller.arena_nbytes == fewer * UNIT


def test_a_larger_arena_adds_and_moves_nothing():
    plan = make_plan(schedule(stage(sizes=(1,) * 12, load=2, passes=20)), 6 * UNIT, [SPREAD], slots=2)
    larger = anew(plan, 9, passes_left=2, slots=2)
    assert set(larger.stages[0].retained) > set(plan.stages[0].retained)
    assert sorted(larger.stages[0].retained) == [0, 1, 3, 4, 6, 7, 10]


def test_with_many_passes_left_the_even_choice_is_worth_its_reads():
    plan = make_plan(schedule(stage(sizes=(1,) * 12, load=2, passes=200)), 7 * UNIT, [PREFIX], slots=2)
    few = make_plan(plan.schedule, 7 * UNIT, observed=seen(plan, plan.stages[0].retained, 1))
    many = make_plan(plan.schedule, 7 * UNIT, observed=seen(plan, plan.stages[0].retained, 200))
    assert few.stages[0].retained == plan.stages[0].retained
    assert many.stages[0].policy == "spread"


def test_what_is_there_costs_no_read_in_the_prediction():
    plan = make_plan(schedule(stage(sizes=(1,) * 4, load=5, passes=3)), 4 * UNIT, [SPREAD])
    everything = frozenset(plan.stages[0].retained)
    assert len(everything) == 4
    assert remaining(plan, seen(plan, everything)) == Estimate(12.0, 0)
    assert remaining(plan, seen(plan, ())).wall_s > 12


@given(any_stage(), st.integers(0, 20), st.sets(st.integers(0, 6)))
@examples(200)
def test_an_adjusted_choice_fits_and_only_thins_out_or_only_adds(one, room, there):
    choices = {i for i, s in enumerate(one.segments) if not s.resident} - one.once
    there &= choices
    chosen = adjust_spread(one, room * UNIT, there)
    assert len(set(chosen)) == len(chosen)
    assert sum(one.segments[i].nbytes for i in chosen) <= room * UNIT
    if sum(one.segments[i].nbytes for i in there) <= room * UNIT:
        assert there <= set(chosen)


def test_holes_end_the_prefetch_of_a_later_stage_until_this_one_is_over():
    one, two = stage("s", (1,) * 8, passes=3), stage("t", (1,) * 4)
    plan = make_plan(schedule(one, two), 7 * UNIT, [SPREAD], slots=2)
    inner = plan.stages[0].retained[-2:]
    holey = make_plan(plan.schedule, 4 * UNIT, [SPREAD], slots=2, observed=seen(plan, inner))
    assert holey.stages[0].layout.is_scattered
    with engine_on(plan) as (engine, store):
        for p in range(3):
            engine.begin_pass("s")
            for i in range(8):
                with engine.visit("s", f"s.{i}"):
                    assert sum(h.room.nbytes for h in list(store.live)) <= engine.plan.arena_nbytes
            engine.end_pass("s", p)
            if p == 0:
                engine.adopt(
                    make_plan(plan.schedule, 4 * UNIT, [SPREAD], slots=2, observed=seen(plan, inner))
                )
        for i in range(4):
            with engine.visit("t", f"t.{i}"):
                pass


def test_without_room_for_the_holes_the_layout_is_a_fresh_one():
    plan = make_plan(schedule(stage(sizes=(1,) * 8, passes=9)), 7 * UNIT, [SPREAD], slots=2)
    top = [plan.stages[0].retained[-1]]
    fresh = anew(plan, 4, top, end=4 * UNIT)
    assert not fresh.stages[0].layout.is_scattered


def test_a_plan_that_moves_what_is_in_use_is_refused_and_changes_nothing():
    plan = make_plan(schedule(stage(sizes=(1,) * 6, passes=3)), 5 * UNIT, [SPREAD])
    other = make_plan(schedule(stage(sizes=(1,) * 6, passes=3)), 2 * UNIT, [SPREAD])
    with engine_on(plan) as (engine, _):
        with engine.visit("s", "s.0"), pytest.raises(EngineError, match=r"s\.0.*in use"):
            engine.adopt(other)
        assert engine.plan is plan
        engine.adopt(other)


def test_stages_before_the_one_that_runs_bound_nothing():
    big, small = stage("big", (8, 8)), stage("small", (1,) * 6, passes=5)
    plan = make_plan(schedule(big, small), 20 * UNIT)
    rest = make_plan(plan.schedule, 3 * UNIT, observed=seen(plan, (), at=1))
    assert rest.arena_nbytes <= 3 * UNIT
    with pytest.raises(BudgetError):
        make_plan(plan.schedule, 3 * UNIT)


def test_passes_left_of_a_stage_without_an_end_are_at_least_one():
    plan = make_plan(schedule(stage(passes=Unknown(2))), 4 * UNIT)
    assert seen(plan, (), passes_left=0).remaining(plan.schedule.stages[0]).passes == Exactly(1)


# -- reads that nobody wants any more ----------------------------------------------------------


def shrinking():
    """Return a plan, and a smaller one that ends before where the first reads its second segment."""
    plan = make_plan(schedule(stage(sizes=(1,) * 6, load=2, passes=9)), 5 * UNIT, [PREFIX], slots=2)
    smaller = make_plan(plan.schedule, 2 * UNIT, [PREFIX], slots=2)
    assert plan.extent(Visit(0, 0, 1)).offset >= smaller.stages[0].layout.end
    return plan, smaller


def test_a_trim_that_waits_gives_back_what_a_dropped_read_wrote():
    gates = Gates("s.1")
    plan, smaller = shrinking()
    kept: list[list[int]] = []

    def keep(extents):
        kept.append([x.end for x in extents if x.offset >= smaller.stages[0].layout.end])

    with engine_on(plan, gates) as (engine, _):
        with engine.visit("s", "s.0"):
            assert gates.started["s.1"].wait(WAIT)
        engine.adopt(smaller)
        waits = Waits(engine)
        with meanwhile(lambda: waits.begun.wait(WAIT) and gates.finish("s.1")):
            engine.trim(keep, wait=True)
        assert kept and kept[-1] == [], "nothing past the new end is in use"


def test_a_trim_that_does_not_wait_is_made_good_when_the_dropped_read_ends():
    gates = Gates("s.1")
    plan, smaller = shrinking()
    again = threading.Event()
    kept: list[list[Extent]] = []

    def keep(extents):
        kept.append([x for x in extents if x.offset >= smaller.stages[0].layout.end])
        if len(kept) == 2:
            again.set()

    with engine_on(plan, gates) as (engine, _):
        with engine.visit("s", "s.0"):
            assert gates.started["s.1"].wait(WAIT)
        engine.adopt(smaller)
        engine.trim(keep)
        assert kept == [[plan.extent(Visit(0, 0, 1))]], "the read still writes there"
        gates.finish("s.1")
        assert again.wait(WAIT)
        assert kept[1] == []


def test_a_trim_does_not_wait_for_a_loader_that_has_failed():
    fail = threading.Event()
    started = threading.Event()

    def before(name):
        if name == "s.1":
            started.set()
            assert fail.wait(WAIT)
            raise OSError("gone")

    plan, smaller = shrinking()
    with engine_on(plan, before) as (engine, _):
        with engine.visit("s", "s.0"):
            assert started.wait(WAIT)
        engine.adopt(smaller)
        waits = Waits(engine)
        with meanwhile(lambda: waits.begun.wait(WAIT) and fail.set()):
            engine.trim(lambda extents: None, wait=True)
