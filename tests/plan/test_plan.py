"""What holds for every plan."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.errors import BudgetError
from blockstream.plan import latency
from blockstream.plan.layout import align_up
from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import NONE, POLICIES, PREFIX, SPREAD
from blockstream.plan.scheduler import Scheduler
from blockstream.plan.segments import Exactly, Schedule, Segment, Stage, Visit
from blockstream.plan.simulate import estimate, simulate
from tests.support.examples import examples
from tests.support.fakes import UNIT, schedule, stage
from tests.support.strategies import plans


@given(plans())
@examples(200)
def test_live_extents_never_overlap_and_stay_in_the_arena(plan):
    scheduler = Scheduler(plan)
    todo = list(plan.schedule.visits())
    peak = 0
    for visit in todo:
        while True:
            while (load := scheduler.next_load()) is not None:
                assert load.extent.offset >= 0 and load.extent.end <= plan.arena_nbytes
                assert load.extent.nbytes >= load.segment.nbytes
                scheduler.loaded(load)
            live = sorted(x.extent for x in scheduler.live)
            assert all(a.end <= b.offset for a, b in pairwise(live))
            peak = max([peak, *(x.end - min(y.offset for y in live) for x in live)])
            if scheduler.acquire(visit) is not None:
                break
        following = todo[todo.index(visit) + 1] if visit != todo[-1] else None
        scheduler.release(visit)
        if following is not None and following.stage != visit.stage:
            scheduler.end_stage(visit.stage)
    assert peak <= plan.arena_nbytes


@given(plans())
@examples(200)
def test_no_plan_beats_the_bound(plan):
    wall = 0.0
    loads = compute = 0.0
    events = simulate(plan)
    wall = max(e.end_s for e in events if e.kind == "execute")
    compute = sum(e.end_s - e.start_s for e in events if e.kind == "execute")
    # Loads that a visit needed; what was prefetched past the end is nobody's.
    needed = [e for e in events if e.kind == "load" and e.end_s <= wall]
    loads = sum(e.end_s - e.start_s for e in needed)
    assert wall >= max(compute, loads) - 1e-9


@given(plans())
@examples(100)
def test_each_pass_takes_at_least_its_compute_and_its_reads(plan):
    """Reads of a pass may begin in the pass before; over a steady pass both rates are bounds."""
    for i, one in enumerate(plan.schedule.stages):
        alone = make_plan(Schedule((one,)), plan.arena_nbytes, POLICIES)
        keep = frozenset(alone.stages[0].retained)
        n = one.passes.expected
        assert alone.predicted.stages[0].wall_s >= latency.bound_s(one, keep, n) - 1e-9, i


@st.composite
def schedules(draw):
    whole = st.integers(1, 9).map(float)
    names = draw(st.sampled_from([("a",), ("a", "b")]))
    built = []
    for name in names:
        costs = draw(st.lists(st.tuples(st.integers(1, 4), whole, whole), min_size=1, max_size=8))
        parts = tuple(Segment(f"{name}.{i}", n * UNIT, l, e) for i, (n, l, e) in enumerate(costs))
        built.append(Stage(name, parts, passes=Exactly(draw(st.integers(1, 5)))))
    return Schedule(tuple(built))


@given(schedules(), st.integers(0, 16))
@examples(150)
def test_auto_is_never_slower_than_any_policy(one, more):
    arena = least_arena(one) + more * UNIT
    auto = make_plan(one, arena, POLICIES).predicted.wall_s
    for policy in POLICIES:
        assert auto <= make_plan(one, arena, [policy]).predicted.wall_s + 1e-9, policy.name


@given(schedules(), st.integers(0, 16))
@examples(100)
def test_the_least_arena_plans_and_less_is_refused(one, more):
    least = least_arena(one)
    assert make_plan(one, least + more * UNIT).arena_nbytes <= least + more * UNIT
    assert make_plan(one, least).arena_nbytes <= least
    with pytest.raises(BudgetError, match=f"the least is {least_of_named(one, least - 1):,}"):
        make_plan(one, least - 1)


def least_of_named(one, arena):
    """The error names the first stage that does not fit."""
    return next(x for x in (least_arena(Schedule((s,))) for s in one.stages) if x > arena)


@given(schedules(), st.integers(0, 12))
@examples(50)
def test_thrift_costs_no_time_and_never_more_memory(one, more):
    arena = least_arena(one) + more * UNIT
    rich, poor = make_plan(one, arena), make_plan(one, arena, thrifty=True)
    assert poor.arena_nbytes <= rich.arena_nbytes
    assert poor.predicted.wall_s <= rich.predicted.wall_s * 1.001 + 1e-9


@pytest.mark.parametrize(("b", "l", "e"), [(28, 2.0, 1.0), (28, 1.0, 1.0), (12, 0.5, 1.0), (5, 3.0, 1.0)])
@pytest.mark.parametrize("share", [0, 0.25, 0.4])
def test_eq_8_and_eq_9_are_the_simulation_with_one_visit_of_lookahead(b, l, e, share):
    d = int(b * share)
    policy = PREFIX if d else NONE

    def wall(n):
        s = stage(sizes=(1,) * b, load=l, execute=e, passes=n)
        plan = make_plan(schedule(s), (d + 2) * UNIT, [policy], slots=2, lookahead=1)
        assert len(plan.stages[0].retained) == d
        return plan.predicted.wall_s, plan.stages[0].retained, s

    (many, kept, s), (few, _, _) = wall(6), wall(5)
    assert many - few == pytest.approx(latency.dynamic_s(b, d, l, e))
    assert many - few == pytest.approx(latency.one_ahead_s(s, kept))
    if not d:
        assert latency.dynamic_s(b, 0, l, e) == latency.concurrent_s(b, l, e)


@given(schedules())
@examples(100)
def test_unequal_segments_follow_the_generalised_equation(one):
    first = Schedule(one.stages[:1])

    def wall(n):
        s = Stage("s", first.stages[0].segments, passes=Exactly(n))
        # Slots of their own for all: only the lookahead limits.
        everything = sum(x.nbytes for x in s.segments)
        return make_plan(Schedule((s,)), 3 * everything, [NONE], slots=8, lookahead=1).predicted.wall_s, s

    if len(first.stages[0].segments) < 2:
        return
    (many, s), (few, _) = wall(6), wall(5)
    assert many - few == pytest.approx(latency.one_ahead_s(s))


def test_published_table_of_policies():
    def total(l, d, slots, policy):
        s = stage(sizes=(1,) * 28, load=l, execute=1, passes=30)
        plan = make_plan(schedule(s), (d + slots) * UNIT, [policy], slots=slots)
        assert len(plan.stages[0].retained) == d
        return plan.predicted.wall_s

    assert 30 * latency.dynamic_s(28, 14, 2.0, 1.0) == 1260
    assert total(2.0, 14, 2, PREFIX) == 1217
    assert total(2.0, 14, 2, SPREAD) == 870
    assert latency.bound_s(stage(sizes=(1,) * 28, load=2.0, passes=30), range(14)) == 868
    assert total(1.3, 7, 2, PREFIX) == pytest.approx(1015, abs=0.5)
    assert total(1.3, 7, 2, SPREAD) == pytest.approx(911, abs=0.5)
    assert total(1.3, 6, 3, SPREAD) == pytest.approx(867, abs=0.5)
    assert latency.bound_s(stage(sizes=(1,) * 28, load=1.3, passes=30), range(7)) == 840


@given(schedules(), st.integers(2, 4))
@examples(100)
def test_the_recurrence_is_the_simulation_for_equal_slots(one, slots):
    s = one.stages[0]
    equal = Stage(
        "s", tuple(Segment(x.name, UNIT, x.load_s, x.execute_s) for x in s.segments), passes=Exactly(3)
    )
    if len(equal.segments) <= slots:
        return
    plan = make_plan(Schedule((equal,)), slots * UNIT, [NONE], slots=slots)
    assert estimate(equal, (), slots).wall_s == pytest.approx(plan.predicted.wall_s)


def test_two_ends_hold_unequal_segments_in_the_largest_pair():
    s = stage(sizes=(10, 1, 10, 1), load=1, passes=2)
    assert least_arena(schedule(s)) == 11 * UNIT
    plan = make_plan(schedule(s), 11 * UNIT, [NONE])
    assert plan.arena_nbytes == 11 * UNIT


def test_a_segment_retained_by_the_plan_is_read_once():
    plan = make_plan(schedule(stage(sizes=(1,) * 6, passes=3)), 4 * UNIT, [SPREAD], slots=2)
    loads = [e.visit for e in simulate(plan) if e.kind == "load"]
    kept = [v for v in loads if plan.is_retained(v)]
    assert len(kept) == len(plan.stages[0].retained) == 2
    assert len(loads) == 6 + 2 * 4


def test_resident_segments_stay_under_every_policy():
    parts = (Segment("rest", UNIT, 1, 0, resident=True), *stage(sizes=(1,) * 5).segments)
    s = Stage("s", parts, passes=Exactly(3))
    for policy in POLICIES:
        plan = make_plan(Schedule((s,)), 4 * UNIT, [policy])
        loads = [e.visit for e in simulate(plan) if e.kind == "load"]
        assert [v.pass_index for v in loads if v.position == 0] == [0], policy.name


def test_nothing_is_loaded_past_an_exact_end():
    plan = make_plan(schedule(stage(passes=2), stage("t", passes=1)), 8 * UNIT, [NONE])
    loads = [e.visit for e in simulate(plan) if e.kind == "load"]
    assert len(loads) == 12 and max(v.pass_index for v in loads if v.stage == 0) == 1


def test_the_next_stage_loads_while_this_one_computes_its_last_segment():
    one, two = stage("t5", load=1, execute=3), stage("dit", load=1, execute=1)
    plan = make_plan(schedule(one, two), 4 * UNIT, [NONE])
    events = simulate(plan)
    head = next(e for e in events if e.kind == "load" and e.visit == Visit(1, 0, 0))
    tail = next(e for e in events if e.kind == "execute" and e.visit == Visit(0, 0, 3))
    assert head.start_s < tail.end_s


def test_budget_error_names_the_stage_the_segment_and_the_least():
    with pytest.raises(
        BudgetError, match=r"stage 's' \(largest segment 's.0', 4,096 bytes\).*least is 8,192"
    ):
        make_plan(schedule(stage()), UNIT)


def test_a_wrong_order_is_refused():
    with pytest.raises(ValueError, match="order names segments \\[7\\]"):
        Stage("s", stage().segments, (0, 7))


def test_extents_are_padded_to_the_block():
    s = Stage("s", (Segment("a", 5000), Segment("b", 1)))
    plan = make_plan(Schedule((s,)), align_up(5000) + UNIT, [PREFIX])
    assert {plan.extent(Visit(0, 0, k)).nbytes for k in (0, 1)} == {8192, 4096}


@pytest.mark.slow
def test_a_stage_of_thousands_of_segments_is_planned_from_few_passes():
    s = stage(sizes=(1,) * 3000, load=1.7, execute=1, passes=30)
    plan = make_plan(schedule(s), 1500 * UNIT)
    assert plan.stages[0].policy == "spread"
    assert plan.predicted.wall_s >= latency.bound_s(s, plan.stages[0].retained) * 0.999
