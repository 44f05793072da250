"""What the engine loads when, and what it does with compute that leaves the plan.

Every store of these tests checks that all handles are released, the suite that no thread is left.
"""

from __future__ import annotations

import pytest

from blockstream.errors import EngineError
from blockstream.plan.retention import NONE, PREFIX, SPREAD
from blockstream.plan.segments import AtMost, Unknown, Visit
from tests.support.fakes import UNIT, Gates, engine_on, stage
from tests.support.interleaving import WAIT, planned, run_pass

# -- what loads when ---------------------------------------------------------------------------


def test_the_first_segment_loads_before_anyone_asks_for_it():
    gates = Gates("s.0")
    with engine_on(planned(), gates):
        assert gates.started["s.0"].wait(WAIT)
        gates.finish("s.0")


def test_the_next_segment_loads_while_this_one_computes():
    gates = Gates("s.1")
    with engine_on(planned(), gates) as (engine, _), engine.visit("s", "s.0"):
        assert gates.started["s.1"].wait(WAIT), "before s.0 is released"
        gates.finish("s.1")


def test_a_third_segment_waits_for_a_slot():
    gates = Gates("s.2")
    with engine_on(planned(), gates) as (engine, _):
        with engine.visit("s", "s.0"), engine.visit("s", "s.1"), engine._condition:
            assert engine._scheduler.next_load() is None, "both slots are in use"
        assert gates.started["s.2"].wait(WAIT)
        gates.finish("s.2")


def test_loads_held_back_leave_room_except_for_what_compute_needs_next():
    gates = Gates("s.0", "s.2", "s.3")
    with engine_on(planned(units=4, policy=PREFIX), gates) as (engine, _):
        assert gates.started["s.0"].wait(WAIT)
        engine.hold_back(UNIT)
        gates.finish("s.0")
        with engine.visit("s", "s.0"), engine.visit("s", "s.1"):
            assert gates.started["s.2"].wait(WAIT), "it is the next visit"
            gates.finish("s.2")
            with engine.visit("s", "s.2"):
                assert gates.started["s.3"].wait(WAIT)
                gates.finish("s.3")


def test_loads_held_back_go_on_when_they_are_let():
    gates = Gates("s.0", "s.2")
    with engine_on(planned(units=4, policy=PREFIX), gates) as (engine, _):
        assert gates.started["s.0"].wait(WAIT)
        engine.hold_back(2 * UNIT)
        gates.finish("s.0")
        with engine.visit("s", "s.0"):
            with engine._condition:
                engine._condition.wait_for(lambda: len(engine._loader.handles) == 2, WAIT)
                assert engine._scheduler.next_load() is None, "there is room, and the plan has it"
            engine.hold_back(None)
            assert gates.started["s.2"].wait(WAIT)
            gates.finish("s.2")


def test_with_one_visit_of_lookahead_a_load_begins_when_compute_does():
    gates = Gates("s.1")
    plan = planned(units=4, slots=4, lookahead=1)
    with engine_on(plan, gates) as (engine, _), engine.visit("s", "s.0"):
        assert gates.started["s.1"].wait(WAIT)
        gates.finish("s.1")


def test_the_first_segment_of_the_next_pass_loads_in_the_last_visit_of_this_one():
    gates = Gates("s.0")
    with engine_on(planned(stage(passes=2)), gates) as (engine, _):
        gates.finish("s.0")
        for i in range(3):
            with engine.visit("s", f"s.{i}"):
                pass
        gates.started["s.0"].clear()
        with engine.visit("s", "s.3"):
            assert gates.started["s.0"].wait(WAIT)


def test_the_next_stage_loads_in_the_last_visit_of_this_one():
    gates = Gates("t.0")
    with engine_on(planned(stage(), stage("t")), gates) as (engine, _):
        for i in range(3):
            with engine.visit("s", f"s.{i}"):
                pass
        with engine.visit("s", "s.3"):
            assert gates.started["t.0"].wait(WAIT)
            gates.finish("t.0")


def test_nothing_is_read_past_an_exact_end():
    with engine_on(planned(stage(passes=2), units=8)) as (engine, store):
        for _ in range(2):
            run_pass(engine)
    assert len(store.loads) == 8


def test_what_is_retained_is_read_once():
    with engine_on(planned(stage(passes=3), units=3, policy=PREFIX, slots=2)) as (engine, store):
        for _ in range(3):
            run_pass(engine)
    assert store.loads.count("s.0") == 1 and store.loads.count("s.3") == 3


@pytest.mark.parametrize("passes", [AtMost(5), Unknown(5)])
def test_an_early_end_drops_what_was_prefetched_for_the_next_pass(passes):
    gates = Gates("t.0")
    plan = planned(stage(passes=passes), stage("t"), units=3)
    with engine_on(plan, gates) as (engine, store):
        run_pass(engine)
        engine.end_stage("s")
        gates.finish("t.0")
        run_pass(engine, "t")
        assert not [h for h in store.live if h.name.startswith("s.")]
        assert store.loads.count("s.0") <= 2


def test_going_to_the_next_stage_ends_this_one():
    with engine_on(planned(stage(passes=AtMost(9)), stage("t"))) as (engine, store):
        run_pass(engine)
        assert engine.begin_pass("t") == 0
        run_pass(engine, "t")
        assert not store.live


# -- out of order ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [NONE, PREFIX, SPREAD], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "ran", [(3, 2, 1, 0), (0, 0, 1, 2, 3), (1, 3), (0, 2, 1, 3), (2, 2, 2), (0, 1, 2, 3, 0, 1)]
)
def test_segments_are_right_in_whatever_order_compute_asks(policy, ran):
    with engine_on(planned(stage(passes=3), stage("t"), units=3, policy=policy, slots=2)) as (engine, _):
        for _ in range(3):
            at = engine.begin_pass("s")
            for i in ran:
                with engine.visit("s", f"s.{i}") as handle:
                    assert handle.name == f"s.{i}" and not handle.released
            engine.end_pass("s", at)
        run_pass(engine, "t")


def test_segments_passed_over_are_not_waited_for():
    with engine_on(planned(stage(passes=2))) as (engine, store):
        for _ in range(2):
            at = engine.begin_pass("s")
            with engine.visit("s", "s.3"):
                pass
            engine.end_pass("s", at)
        assert engine.unplanned == 0
        assert store.loads.count("s.3") == 2


def test_a_segment_that_the_order_leaves_out_is_loaded_on_demand():
    with engine_on(planned(stage(order=(0, 2, 3)))) as (engine, store):
        for i in (0, 1, 2, 3):
            with engine.visit("s", f"s.{i}"):
                pass
        assert engine.unplanned == 1 and store.loads.count("s.1") == 1


@pytest.mark.parametrize("policy", [NONE, SPREAD], ids=lambda p: p.name)
def test_a_call_after_the_last_declared_pass_is_loaded_on_demand(policy):
    with engine_on(planned(stage(passes=1), stage("t"), units=3, policy=policy, slots=2)) as (engine, _):
        assert engine.begin_pass("s") == 0
        run_pass(engine)
        engine.end_pass("s", 0)
        for _ in range(2):
            assert engine.begin_pass("s") is None
            run_pass(engine)
            engine.end_pass("s", None)
        assert engine.unplanned == 8
        run_pass(engine, "t")
        assert engine.unplanned == 8


def test_an_unplanned_visit_is_numbered_by_its_pass_and_segment():
    with engine_on(planned(stage(passes=2))) as (engine, _):
        with engine.visit("s", "s.2"):
            pass
        visit, _ = engine.acquire("s", "s.0")
        assert visit == Visit(0, 0, 4 + 0)
        engine.release(visit)


def test_two_slots_cannot_hold_three_segments_at_once():
    refused = pytest.raises(EngineError, match=r"'s.2' is asked for while 's.0' is in use")
    with engine_on(planned()) as (engine, _), engine.visit("s", "s.0"), engine.visit("s", "s.1"), refused:
        engine.acquire("s", "s.2")


def test_unknown_names_and_double_releases_are_errors():
    with engine_on(planned()) as (engine, _):
        with pytest.raises(KeyError, match="no stage 'x'"):
            engine.acquire("x", "s.0")
        with pytest.raises(EngineError, match=r"'s' has no segment 's.9'"):
            engine.acquire("s", "s.9")
        visit, _ = engine.acquire("s", "s.0")
        engine.release(visit)
        with pytest.raises(EngineError, match="was not acquired"):
            engine.release(visit)


# -- another plan ------------------------------------------------------------------------------


def test_a_plan_that_retains_others_is_adopted_between_passes():
    six = stage(sizes=(1,) * 6, passes=4)
    one, two = (planned(six, units=4, policy=p, slots=2) for p in (PREFIX, SPREAD))
    assert one.stages[0].retained != two.stages[0].retained
    with engine_on(one) as (engine, _):
        for plan in (two, one, two):
            at = engine.begin_pass("s")
            run_pass(engine, count=6)
            engine.end_pass("s", at)
            engine.adopt(plan)
            assert engine.plan is plan
        run_pass(engine, count=6)
        assert engine.unplanned == 0
    kinds = [s.kind for s in engine.ledger.spans if s.thread == "compute"]
    assert kinds.count("replan") == 3


def test_a_plan_is_adopted_while_a_load_of_the_old_one_is_in_flight():
    gates = Gates("s.1")
    wide, narrow = planned(stage(passes=3), units=4, slots=4), planned(stage(passes=3), units=2)
    with engine_on(wide, gates) as (engine, _):
        with engine.visit("s", "s.0"):
            assert gates.started["s.1"].wait(WAIT)
        engine.end_pass("s", 0)
        engine.adopt(narrow)
        gates.finish("s.1")
        for _ in range(2):
            run_pass(engine)
        assert engine.unplanned == 0
