"""The simulator and the engine give the same timeline, event for event."""

from __future__ import annotations

from hypothesis import given, settings

from blockstream.plan.planner import make_plan
from blockstream.plan.retention import PREFIX, SPREAD
from blockstream.plan.segments import AtMost
from blockstream.plan.simulate import simulate
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


@given(plans())
@settings(max_examples=150, deadline=None)
def test_any_plan_runs_as_simulated(plan):
    assert_agree(plan)
