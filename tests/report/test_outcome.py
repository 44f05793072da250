"""A run's accounts: predicted for what ran, the equations' terms, the peak's moment, the disk's own speed."""

from __future__ import annotations

import pytest

from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span, Spans
from blockstream.plan import latency
from blockstream.plan.planner import make_plan
from blockstream.plan.retention import NONE, PREFIX
from blockstream.plan.segments import AtMost, Visit
from blockstream.report.outcome import attention_account, budget_account, doing, predicted_for, stage_accounts
from blockstream.report.stages import stage_summaries
from blockstream.system.memory import Held, MemoryWatch
from tests.support.fakes import UNIT, schedule, stage
from tests.support.runs import write_ledger


def a_plan(policy=NONE, units=2, load=1.0, execute=1.0, passes=5):
    one = stage("dit", (1,) * 8, load=load, execute=execute, passes=AtMost(passes))
    return make_plan(schedule(one), units * UNIT, [policy], slots=2, lookahead=1)


def accounts(plan, ledger):
    return stage_accounts(stage_summaries(plan, ledger.spans.totals), plan)[0]


def test_the_prediction_is_for_the_passes_that_ran():
    plan = a_plan(passes=30)
    fewer = predicted_for(plan, {"dit": 18})
    assert fewer.stages[0].passes == 18
    assert fewer.wall_s < plan.predicted.wall_s
    assert predicted_for(plan, {}).wall_s == plan.predicted.wall_s


def test_a_run_as_predicted_is_off_by_nothing(tmp_path):
    plan = a_plan(passes=4)
    ledger = write_ledger(tmp_path / "ledger.jsonl", plan)
    account = accounts(plan, ledger)
    assert account["wall_s"] == pytest.approx(account["predicted_s"], rel=1e-6)
    assert account["declared_passes"] == account["passes"] == 4
    assert account["predicted"]["read_nbytes"] == account["read_nbytes"]
    assert account["outside_s"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("load", "execute"), [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0)])
def test_eight_and_nine_hold_for_a_simulated_run(tmp_path, load, execute):
    plan = a_plan(PREFIX, units=5, load=load, execute=execute, passes=40)
    account = accounts(plan, write_ledger(tmp_path / "ledger.jsonl", plan))
    b, d, l, e = (account[k] for k in ("b", "d", "l_s", "e_s"))
    assert (b, d) == (8, 3)
    assert account["r8_s"] == latency.concurrent_saving_s(b, l, e)
    # The first pass fills: over many passes the saving a pass comes near Eq. 9's.
    assert account["r_s"] == pytest.approx(account["r9_s"], rel=0.1)
    assert abs(account["alpha_s"]) < 0.1 * b * (l + e)


def test_what_runs_between_the_blocks_is_no_overhead_of_loading():
    plan = a_plan(passes=1, load=1.0, execute=1.0)
    spans, at = Spans(), 0.0
    for k in range(8):
        spans.append(Span("compute", "execute", at, at + 1.0, f"dit.{k}", Visit(0, 0, k)))
        spans.append(Span("loader", "load", at, at + 1.0, f"dit.{k}", Visit(0, 0, k), UNIT))
        at += 1.5
    account = stage_accounts(stage_summaries(plan, spans.totals), plan)[0]
    assert account["outside_s"] == pytest.approx(3.5)
    assert account["r_s"] == pytest.approx(8.0)


def test_without_a_plan_what_was_measured_stands_alone(tmp_path):
    plan = a_plan()
    ledger = write_ledger(tmp_path / "ledger.jsonl", plan)
    (account,) = stage_accounts(stage_summaries(plan, ledger.spans.totals), None)
    assert "predicted_s" not in account and account["r8_s"] > 0


def test_the_peak_is_told_with_its_moment_and_what_ran_then():
    now = [0.0]
    held = iter([100, 900, 300, 300])
    read = lambda: Held(next(held), 0)  # noqa: E731
    with MemoryWatch(800, every_s=60, read=read, clock=lambda: now[0]) as watch:
        now[0] = 2.0
        watch.sample()
        now[0] = 4.0
        watch.sample()
    spans = [Span("compute", "execute", 10.0, 13.0, "block.3", Visit(0, 0, 3))]
    account = budget_account(watch, 10.0, spans, runtime=80, activations=20)
    assert account["held"] is False
    assert (account["peak_nbytes"], account["peak_at_s"]) == (900, 12.0)
    assert account["peak_during"] == "computing block.3"
    assert account["by_cause"] == {"arena": 0, "runtime": 80, "activations": 20, "other": 800}


def test_a_budget_is_not_called_held_by_a_watch_that_failed():
    read = iter([Held(100, 0)]).__next__
    with MemoryWatch(800, every_s=60, read=read) as watch:
        watch.sample()
    account = budget_account(watch, 0.0, [], runtime=80, activations=20)
    assert account["held"] is False and account["peak_nbytes"] == 100


def test_waiting_and_phases_are_said_in_words():
    spans = [
        Span("loader", "load", 0, 9, "b"),
        Span("compute", "stall", 0, 1, "b", Visit(0, 0, 0)),
        Span("compute", "outside", 1, 2, "decode"),
    ]
    assert [doing(spans, t) for t in (0.5, 1.5, 5.0)] == ["waiting for b", "decode", ""]


def test_passes_that_merged_are_told_from_those_that_did_not():
    now = [0.0]
    ledger = Ledger(clock=lambda: now[0])
    ledger.add(Span("compute", "execute", 0.0, 5.0, "t5", Visit(0, 0, 0)))
    for p, took in enumerate([1.0, 1.0, 2.0, 2.0]):
        begin = 10.0 + 4 * p
        ledger.add(Span("compute", "execute", begin, begin + took, "dit", Visit(1, p, 0)))
        now[0] = begin + 0.1
        if p in (0, 2):
            ledger.note("merging", p == 0)
    account = attention_account(["tdtm"], 6, ledger)
    assert (account["merged_passes"], account["plain_passes"]) == (2, 2)
    assert (account["merged_pass_s"], account["plain_pass_s"]) == (1.0, 2.0)


def test_nothing_merged_is_told_as_nothing():
    account = attention_account([], 0, Ledger())
    assert (account["merged_passes"], account["merged_pass_s"], account["plain_pass_s"]) == (0, None, None)
