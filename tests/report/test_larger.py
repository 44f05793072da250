"""What a larger budget would save: beside this plan, and beside a run as it was measured."""

import pytest

from blockstream.plan.planner import make_plan
from blockstream.plan.retention import POLICIES
from blockstream.plan.segments import AtMost
from blockstream.report.curve import Point
from blockstream.report.larger import a_year, as_measured, larger_budgets, larger_for_run, larger_text
from blockstream.report.outcome import stage_accounts
from blockstream.report.stages import stage_summaries
from tests.support.fakes import UNIT, schedule, stage
from tests.support.runs import write_ledger

CURVE = [
    Point(a, s, r) for a, s, r in ((2, 100.0, 50), (4, 60.0, 30), (6, 20.0, 10), (8, 20.0, 10), (9, 15.0, 0))
]


def test_the_knee_and_the_end_of_gains_above_this_arena_are_told():
    found = larger_budgets(CURVE, 2, lambda arena: 100 + arena)
    assert [(x["budget_nbytes"], x["more_nbytes"], x["saves_s"], x["saves_read_nbytes"]) for x in found] == [
        (106, 4, 80.0, 40),
        (109, 7, 85.0, 50),
    ]
    assert [x["more_nbytes"] for x in larger_budgets(CURVE, 7, lambda arena: arena)] == [2]
    assert (
        larger_budgets(CURVE, 9, lambda arena: arena) == larger_budgets(CURVE, 99, lambda arena: arena) == []
    )


def test_reading_that_costs_no_time_is_worth_a_word():
    curve = [Point(2, 10.0, 50), Point(4, 10.0, 0)]
    (found,) = larger_budgets(curve, 2, lambda arena: arena)
    assert (found["saves_s"], found["saves_read_nbytes"]) == (0.0, 50)
    assert larger_text([found]) == "+2 B of budget saves 50 B of reading"
    assert larger_text([]) == "a larger budget saves nothing"


@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_a_run_is_told_by_the_seconds_it_took_not_by_those_it_was_to_take(tmp_path, slower):
    one = stage("dit", (1,) * 8, load=1.0, execute=1.0, passes=AtMost(30))
    plan = make_plan(schedule(one), 3 * UNIT, POLICIES, slots=2, lookahead=1)
    real = stage("dit", (1,) * 8, load=slower, execute=1.0, passes=AtMost(10))
    ran = make_plan(schedule(real), 3 * UNIT, POLICIES, slots=2, lookahead=1)
    ledger = write_ledger(tmp_path / "ledger.jsonl", ran)
    accounts = stage_accounts(stage_summaries(ran, ledger.spans.totals), plan)
    (scaled,) = as_measured(plan.schedule, accounts).stages
    assert scaled.passes.expected == accounts[0]["passes"]
    assert scaled.segments[0].load_s == pytest.approx(slower, rel=0.05)
    assert scaled.segments[0].execute_s == pytest.approx(1.0, rel=0.05)
    summary = {"arena": {"nbytes": 3 * UNIT}}
    found = larger_for_run(plan, accounts, POLICIES, summary, lambda arena: 7)
    whole = make_plan(schedule(real), 8 * UNIT, POLICIES)
    assert found[-1]["more_nbytes"] <= 5 * UNIT
    least = ran.predicted.wall_s - whole.predicted.wall_s
    assert found[-1]["saves_s"] == pytest.approx(least, rel=0.1, abs=0.02 * ran.predicted.wall_s)


def test_a_run_of_nothing_or_of_too_many_visits_is_not_planned_again(monkeypatch):
    monkeypatch.setattr("blockstream.report.larger.budget_curve", None)
    one = stage("dit", (1,) * 8, passes=AtMost(3000))
    plan = make_plan(schedule(one), 8 * UNIT, POLICIES)
    assert larger_for_run(None, [], POLICIES, {}, lambda arena: 0) is None
    assert larger_for_run(plan, [{"name": "dit", "passes": 3000}], POLICIES, {}, lambda arena: 0) is None


def test_a_year_is_of_such_runs_one_after_another():
    assert a_year(1000, 86_400.0) == 365_000
    assert a_year(1000, 0.0) is None
