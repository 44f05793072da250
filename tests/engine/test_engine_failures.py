"""What goes wrong in either thread surfaces, keeps nobody waiting and leaves nothing behind.

Every store of these tests checks that all handles are released, the suite that no thread is left.
"""

from __future__ import annotations

import signal
import threading

import pytest

from blockstream.engine.engine import Engine
from blockstream.errors import EngineError, SegmentLoadError
from tests.support.fakes import UNIT, FakeStore, Gates, engine_on, stage
from tests.support.interleaving import WAIT, Waits, failing, meanwhile, planned, run_pass

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
        def bring(self, segment, room):
            handle = super().bring(segment, room)
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
