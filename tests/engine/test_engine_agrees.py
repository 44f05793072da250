"""The simulator and the engine give the same timeline, event for event."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from blockstream.plan.planner import make_plan
from blockstream.plan.retention import PREFIX, SPREAD
from blockstream.plan.segments import AtMost
from blockstream.plan.simulate import simulate
from tests.support.examples import examples
from tests.support.fakes import UNIT, run_engine, schedule, stage
from tests.support.strategies import plans


def timeline(spans):
    return sorted(
        (s.kind, s.visit, s.start_s, s.end_s)
        for s in spans
        if s.kind in ("load", "execute") and s.visit is not None
    )


def predicted(plan):
    events = simulate(plan)
    last = max(e.end_s for e in events if e.kind == "execute")
    return sorted((e.kind, e.visit, e.start_s, e.end_s) for e in events), last


def assert_agree(plan):
    events, last = predicted(plan)
    real = timeline(run_engine(plan))
    # A load in flight when the last visit ends is cut off by the end of the run in both.
    assert [e for e in real if e[2] < last] == [e for e in events if e[2] < last]


def test_uniform_stage_runs_as_simulated():
    assert_agree(make_plan(schedule(stage(sizes=(1,) * 6, load=2, execute=1, passes=4)), 4 * UNIT, [SPREAD]))


def test_two_stages_run_as_simulated():
    one = stage("t5", (2,) * 4, load=3, execute=1)
    two = stage("dit", (1, 2, 1), load=1, execute=2, passes=AtMost(3))
    assert_agree(make_plan(schedule(one, two), 5 * UNIT, [PREFIX]))


def test_one_visit_of_lookahead_runs_as_simulated():
    plan = make_plan(schedule(stage(passes=3, load=2)), 4 * UNIT, [PREFIX], slots=2, lookahead=1)
    assert_agree(plan)


def test_what_only_the_first_pass_visits_is_loaded_once_and_the_rest_as_before():
    one = stage(sizes=(1,) * 6, load=2, execute=1, passes=3)
    plan = make_plan(schedule(replace(one, once=frozenset({1, 2, 5}))), 3 * UNIT, [SPREAD])
    loads = [e.visit for e in simulate(plan) if e.kind == "load"]
    read = [one.order[v.position] for v in loads]
    assert all(read.count(i) == 1 for i in (1, 2, 5))
    assert [v for v in loads if v.pass_index and v.position in (1, 2, 5)] == []
    assert_agree(plan)


def test_a_stage_that_is_kept_above_makes_room_for_the_next_after_its_first_pass():
    kept = replace(stage("a", (1,) * 3, execute=4, passes=5), once=frozenset(range(3)))
    plan = make_plan(schedule(kept, stage("b", (1,) * 3)), 2 * UNIT, [SPREAD])
    assert [e.visit.stage for e in simulate(plan) if e.kind == "load"] == [0, 0, 0, 1, 1, 1]
    assert_agree(plan)


@given(plans())
@examples(150)
def test_any_plan_runs_as_simulated(plan):
    assert_agree(plan)
