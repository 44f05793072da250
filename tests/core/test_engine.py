"""Interleavings of the compute and the loader thread: errors surface, nothing waits for ever, nothing leaks.

Every store of these tests checks that all handles are released, the suite that no thread is left.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

import pytest

from blockstream.engine import Engine
from blockstream.errors import EngineError, SegmentLoadError
from blockstream.plan import make_plan
from blockstream.retention import NONE, PREFIX, SPREAD
from blockstream.segments import AtMost, Unknown, Visit

from ..support.fakes import UNIT, FakeStore, Gates, engine_on, schedule, stage

WAIT = 5


def planned(*stages, units=2, policy=NONE, **options):
    return make_plan(schedule(*(stages or [stage()])), units * UNIT, [policy], **options)


def failing(name, error):
    def before(segment):
        if segment == name:
            raise error

    return before


def run_pass(engine, name="s", count=4):
    for i in range(count):
        with engine.visit(name, f"{name}.{i}"):
            pass


class Waits:
    """Sets `begun` when compute begins to wait for a load: no test needs to sleep until it does."""

    def __init__(self, engine):
        self.begun = threading.Event()
        wait = engine._condition.wait

        def told(timeout=None):
            if threading.current_thread() is not engine._loader._thread:
                self.begun.set()
            return wait(timeout)

        engine._condition.wait = told


@contextmanager
def meanwhile(act):
    """Run `act` in another thread for the length of the block."""
    failed = []

    def run():
        try:
            act()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=run)
    other.start()
    try:
        yield
    finally:
        other.join(timeout=10)
    assert not other.is_alive() and not failed, failed


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


# -- loads that fail ---------------------------------------------------------------------------


def test_a_load_that_fails_during_compute_surfaces_where_its_segment_is_needed():
    before = failing("s.2", OSError("the disk is gone"))
    with engine_on(planned(units=3, slots=3), before) as (engine, _):
        for i in range(2):
            with engine.visit("s", f"s.{i}"):
                engine._loader._thread.join(WAIT)  # it has failed before s.1 is asked for
        with pytest.raises(
            SegmentLoadError, match=r"'s.2' could not be loaded.*OSError: the disk is gone"
        ) as e:
            engine.acquire("s", "s.2")
        assert isinstance(e.value.__cause__, OSError)


def test_a_load_that_fails_while_compute_waits_for_it_ends_the_wait():
    fail = threading.Event()

    def before(name):
        if name == "s.1":
            assert fail.wait(WAIT)
            raise OSError("the disk is gone")

    with engine_on(planned(), before) as (engine, _):
        waits = Waits(engine)
        with engine.visit("s", "s.0"):
            pass
        gone = pytest.raises(SegmentLoadError, match=r"'s.1'.*the disk is gone")
        with meanwhile(lambda: waits.begun.wait(WAIT) and fail.set()), gone:
            engine.acquire("s", "s.1")


def test_the_stores_own_error_is_not_wrapped():
    own = SegmentLoadError("segment 's.0', file x: 3 bytes short")
    with engine_on(planned(), failing("s.0", own)) as (engine, _):
        for _ in range(2):  # and again, should anyone ask again
            with pytest.raises(SegmentLoadError, match="3 bytes short") as e:
                engine.acquire("s", "s.0")
            assert e.value is own


def test_a_failed_load_of_another_segment_says_what_was_waited_for():
    with engine_on(planned(), failing("s.0", OSError("gone"))) as (engine, _):
        engine._loader._thread.join(WAIT)
        with pytest.raises(
            SegmentLoadError, match=r"'s.0' could not be loaded \(while 's.3' was waited for\)"
        ):
            engine.acquire("s", "s.3")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("no room")])
def test_whatever_ends_the_loader_reaches_compute(error):
    heard = pytest.raises(SegmentLoadError, match=type(error).__name__)
    with engine_on(planned(), failing("s.0", error)) as (engine, _), heard:
        engine.acquire("s", "s.0")


def test_a_loader_that_dies_outside_a_load_does_not_hang_compute():
    with engine_on(planned()) as (engine, _):
        with engine.visit("s", "s.0"), engine._condition:
            engine._scheduler.next_load = None  # the next call raises TypeError
            engine._condition.notify_all()
        with pytest.raises(EngineError, match=r"loading ended before segment 's.3'.*TypeError"):
            engine.acquire("s", "s.3")


def test_a_handle_that_cannot_be_released_when_dropped_does_not_hang_compute():
    gates = Gates("s.1")

    class Stubborn(FakeStore):
        def load(self, stage, segment, room):
            handle = super().load(stage, segment, room)
            if segment == "s.1":
                handle.release = self.refuse(handle)
            return handle

        def refuse(self, handle):
            def release():
                self.live.remove(handle)
                raise OSError("cannot unmap")

            return release

    store = Stubborn(gates)
    with Engine(planned(stage(), stage("t")), store) as engine:
        with engine.visit("s", "s.0"):
            assert gates.started["s.1"].wait(WAIT)
        engine.end_stage("s")
        gates.finish("s.1")
        with pytest.raises(EngineError, match=r"OSError: cannot unmap"):
            engine.acquire("t", "t.0")
    store.close()


# -- compute that fails ------------------------------------------------------------------------


def test_an_exception_in_compute_surfaces_and_releases_the_segment():
    with (
        pytest.raises(ZeroDivisionError),
        engine_on(planned()) as (engine, store),
        engine.visit("s", "s.0"),
    ):
        raise ZeroDivisionError
    store.close()


def test_the_engine_goes_on_after_an_exception_in_compute():
    with engine_on(planned(stage(passes=2))) as (engine, _):
        at = engine.begin_pass("s")
        with pytest.raises(ZeroDivisionError), engine.visit("s", "s.1"):
            raise ZeroDivisionError
        engine.end_pass("s", at)
        assert engine.begin_pass("s") == 1
        run_pass(engine)
        assert engine.unplanned == 0


def test_ctrl_c_in_compute_leaves_nothing():
    with (
        pytest.raises(KeyboardInterrupt),
        engine_on(planned()) as (engine, store),
        engine.visit("s", "s.0"),
    ):
        signal.raise_signal(signal.SIGINT)
    store.close()


def test_ctrl_c_while_waiting_for_a_load_leaves_nothing():
    gates = Gates("s.0")
    main = threading.get_ident()

    def interrupt():
        assert waits.begun.wait(WAIT)
        signal.pthread_kill(main, signal.SIGINT)

    store = FakeStore(gates)
    with pytest.raises(KeyboardInterrupt), Engine(planned(), store) as engine:
        waits = Waits(engine)
        with meanwhile(interrupt):
            try:
                engine.acquire("s", "s.0")
            finally:
                gates.finish("s.0")
    store.close()


def test_the_engine_goes_on_after_ctrl_c_while_waiting():
    gates = Gates("s.0")
    main = threading.get_ident()

    def interrupt():
        assert waits.begun.wait(WAIT)
        signal.pthread_kill(main, signal.SIGINT)

    with engine_on(planned(), gates) as (engine, _):
        waits = Waits(engine)
        with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
            engine.acquire("s", "s.0")
        gates.finish("s.0")
        run_pass(engine)
        assert engine.unplanned == 0


def test_ctrl_c_during_close_is_made_good_by_closing_again():
    gates = Gates("s.1")
    store = FakeStore(gates)
    engine = Engine(planned(), store).start()
    with engine.visit("s", "s.0"):
        assert gates.started["s.1"].wait(WAIT)
    join = engine._loader._thread.join

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    engine._loader._thread.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    gates.finish("s.1")
    join(WAIT)
    assert not store.live, "the load that was in flight is released by the loader"
    engine._loader._thread.join = join
    engine.close()


# -- the end -----------------------------------------------------------------------------------


def test_closing_during_a_load_waits_for_it_and_releases_it():
    gates = Gates("s.1")
    store = FakeStore(gates)
    engine = Engine(planned(), store).start()
    with engine.visit("s", "s.0"):
        assert gates.started["s.1"].wait(WAIT)
    with meanwhile(engine.close):
        gates.finish("s.1")
    assert store.loads == ["s.0", "s.1"]
    store.close()


def test_closing_from_another_thread_ends_a_wait():
    gates = Gates("s.0")
    store = FakeStore(gates)
    engine = Engine(planned(), store).start()
    waits = Waits(engine)

    def close():
        assert waits.begun.wait(WAIT)
        engine.close()

    def let_through():
        assert engine_closed.wait(WAIT)
        gates.finish("s.0")

    engine_closed = threading.Event()
    with meanwhile(close), meanwhile(let_through):
        with pytest.raises(EngineError, match="closed"):
            engine.acquire("s", "s.0")
        engine_closed.set()
    store.close()


def test_a_stage_that_ends_during_a_load_drops_it():
    gates = Gates("s.1")
    with engine_on(planned(stage(), stage("t")), gates) as (engine, store):
        with engine.visit("s", "s.0"):
            assert gates.started["s.1"].wait(WAIT)
        engine.end_stage("s")
        assert [h.name for h in store.live] == ["s.1"], "it is still being read"
        gates.finish("s.1")
        with engine.visit("t", "t.0"):
            assert "s.1" not in [h.name for h in store.live]


def test_use_after_close_is_an_error_and_ends_are_not():
    plan = planned()
    with engine_on(plan) as (engine, store):
        held, _ = engine.acquire("s", "s.0")
        engine.close()
        assert not store.live
        engine.release(held)
        engine.end_pass("s", 0)
        engine.end_stage("s")
        for use in (
            lambda: engine.acquire("s", "s.1"),
            lambda: engine.begin_pass("s"),
            lambda: engine.adopt(plan),
            engine.start,
        ):
            with pytest.raises(EngineError, match="closed"):
                use()


def test_an_engine_that_was_not_started_says_so():
    engine = Engine(planned(), FakeStore())
    with pytest.raises(EngineError, match="before the engine was started"):
        engine.acquire("s", "s.0")
    engine.close()


def test_every_handle_is_released_at_close_though_one_cannot_be():
    store = FakeStore()
    engine = Engine(planned(units=4, slots=3), store).start()
    _, handle = engine.acquire("s", "s.0")
    _, other = engine.acquire("s", "s.1")
    release = handle.release

    def refuse():
        release()
        raise OSError("cannot unmap")

    handle.release = refuse
    with pytest.raises(OSError, match="cannot unmap"):
        engine.close()
    assert other.released
    store.close()


# -- observers ---------------------------------------------------------------------------------


def test_observers_see_every_load_and_every_execution():
    loaded, executed = [], []
    store = FakeStore()
    plan = planned(stage(passes=2))
    with Engine(plan, store, on_loaded=loaded.append, on_executed=executed.append) as engine:
        for _ in range(2):
            run_pass(engine)
    assert [s.label for s in executed] == [f"s.{i}" for i in range(4)] * 2
    assert [s.label for s in loaded] == store.loads
    assert all(s.nbytes == UNIT for s in loaded)


def test_an_observer_of_executions_that_raises_is_heard_where_compute_is():
    def refuse(span):
        raise ValueError(f"I do not like {span.label}")

    store = FakeStore()
    with Engine(planned(), store, on_executed=refuse) as engine:
        with pytest.raises(ValueError, match=r"I do not like s.0"), engine.visit("s", "s.0"):
            pass
        engine._on_executed = None
        run_pass(engine)
    store.close()


def test_an_observer_of_loads_that_raises_surfaces_at_the_next_segment_that_is_needed():
    def refuse(span):
        raise ValueError(f"I do not like {span.label}")

    store = FakeStore()
    with Engine(planned(), store, on_loaded=refuse) as engine:
        with engine.visit("s", "s.0"):  # it was loaded
            pass
        with pytest.raises(EngineError, match=r"ValueError: I do not like s.0"):
            engine.acquire("s", "s.1")
    store.close()


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
