"""Passes that take longer or shorter than others: predicted as they come, planned as they are left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.plan import latency
from blockstream.plan.planner import Observed, make_plan
from blockstream.plan.retention import NONE
from blockstream.plan.segments import Exactly
from blockstream.plan.simulate import SIMULATED_PACED_VISITS, estimate, predict, simulate
from tests.support.examples import examples
from tests.support.fakes import UNIT, schedule, stage


def paced(pace, **more):
    return replace(stage(sizes=(1,) * 4, **more), pace=tuple(pace))


def test_each_pass_executes_at_its_own_pace_and_those_left_out_at_one():
    plan = make_plan(schedule(paced((0.5, 0.5, 2.0), load=0.0, execute=1.0, passes=4)), 2 * UNIT, [NONE])
    by_pass = [0.0] * 4
    for event in simulate(plan):
        if event.kind == "execute":
            by_pass[event.visit.pass_index] += event.end_s - event.start_s
    assert by_pass == [2.0, 2.0, 8.0, 4.0]


@given(
    pace=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), max_size=12),
    passes=st.integers(1, 12),
    load=st.floats(0.1, 3.0),
    slots=st.integers(2, 3),
)
@examples(100)
def test_the_recurrence_is_the_simulation_at_every_pace(pace, passes, load, slots):
    one = paced(pace, load=load, passes=passes)
    plan = make_plan(schedule(one), slots * UNIT, [NONE], slots=slots)
    assert estimate(one, (), slots).wall_s == pytest.approx(plan.predicted.wall_s)


def test_many_passes_of_one_pace_cost_no_more_than_a_few():
    one = paced([0.5] * 5000 + [1.0] * 5000, load=0.1, execute=1.0, passes=10_000)
    assert estimate(one, (), 2).wall_s == pytest.approx(0.1 + 4 * (5000 * 0.5 + 5000), rel=1e-3)


def test_a_schedule_too_long_to_simulate_is_predicted_at_its_mean_pace():
    passes = SIMULATED_PACED_VISITS
    one = paced([0.5] * (passes // 2), load=0.1, execute=1.0, passes=passes)
    plan = make_plan(schedule(one), 2 * UNIT, [NONE])
    assert predict(plan).stages[0].execute_s == pytest.approx(4 * passes * 0.75)


def test_the_bound_follows_the_pace():
    one = paced((0.5, 3.0), load=0.1, execute=1.0, passes=3)
    assert latency.bound_s(one) == pytest.approx(4 * (0.5 + 3.0 + 1.0))


def test_what_is_left_of_a_run_keeps_the_paces_to_come():
    one = paced((0.5, 0.5, 2.0), passes=4)
    plan = make_plan(schedule(one), 2 * UNIT, [NONE])
    left = Observed(plan, 0, 2, frozenset(), 0).remaining(one)
    assert (left.passes, left.pace) == (Exactly(2), (2.0,))


def test_a_pace_that_is_not_above_zero_is_refused():
    with pytest.raises(ValueError, match="pace"):
        paced((1.0, 0.0))
