"""Fake segments, stores and a virtual clock: the engine's threads without a disk and without waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

from blockstream.engine.engine import Engine
from blockstream.engine.spans import Span
from blockstream.engine.store import Loading, Whole
from blockstream.plan.loads import Load
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Exactly, Extent, Passes, Schedule, Segment, Stage, Visit

UNIT = 4096


def stage(name="s", sizes=(1,) * 4, load=1.0, execute=1.0, passes: Passes | int = 1, order=()) -> Stage:
    """Return a stage of segments name.0, name.1, ... of `sizes` units."""
    segments = tuple(
        Segment(f"{name}.{i}", n * UNIT, load_s=load * (n or 1), execute_s=execute)
        for i, n in enumerate(sizes)
    )
    return Stage(name, segments, tuple(order), Exactly(passes) if isinstance(passes, int) else passes)


def schedule(*stages: Stage) -> Schedule:
    return Schedule(tuple(stages))


def a_load(stage: str, segment: str, extent: Extent) -> Load:
    """Return a load as a scheduler would make it, of the first visit of a stage."""
    sized = Segment(segment, extent.nbytes)
    return Load(stage, Visit(0, 0, 0), (0, 0), sized, extent, retained=False)


class FakeHandle:
    def __init__(self, store: FakeStore, name: str, room: Extent) -> None:
        self.name, self.room, self.released = name, room, False
        self._store = store

    def read(self) -> None:
        pass

    def release(self) -> None:
        assert not self.released, f"{self.name} is released twice"
        self.released = True
        self._store.live.remove(self)


class FakeStore:
    """Loads at once, and asserts what every store may rely on: no two live rooms overlap."""

    def __init__(self, before_load: Callable[[str], None] = lambda name: None) -> None:
        self.live: list[FakeHandle] = []
        self.loads: list[str] = []
        self._before_load = before_load

    def begin(self, load: Load) -> Loading:
        return Whole(partial(self.bring, load.segment.name, load.extent))

    def bring(self, segment: str, room: Extent) -> FakeHandle:
        for other in list(self.live):
            assert not other.room.overlaps(room), f"{segment} is loaded over {other.name}"
        handle = FakeHandle(self, segment, room)
        self.live.append(handle)
        self.loads.append(segment)
        try:
            self._before_load(segment)
        except BaseException:
            self.live.remove(handle)
            raise
        return handle

    def close(self) -> None:
        assert not self.live


class Gates:
    """Events that a test opens: `started[name]` is set when a load begins, `finish(name)` lets it end."""

    def __init__(self, *names: str) -> None:
        self.started = {n: threading.Event() for n in names}
        self._finish = {n: threading.Event() for n in names}

    def __call__(self, name: str) -> None:
        if name in self.started:
            self.started[name].set()
            assert self._finish[name].wait(timeout=10), f"{name} is never let through"

    def finish(self, *names: str) -> None:
        for name in names:
            self._finish[name].set()


class VirtualClock:
    """Time that moves only when every thread of the engine sleeps or waits.

    Threads: the one that made the clock (compute) and those announced by `thread`. `sleep` lasts virtual
    seconds; conditions are watched so that a waiting thread lets time move on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._time = 0.0
        self._running = 1
        self._sleepers: list[tuple[float, threading.Event]] = []

    def now(self) -> float:
        return self._time

    def thread(self, thread: threading.Thread) -> threading.Thread:
        run = thread.run

        def counted() -> None:
            try:
                run()
            finally:
                self._block()

        start = thread.start

        def begin() -> None:
            self._unblock()
            start()

        join = thread.join

        def finish(timeout=None) -> None:
            self._block()
            join(timeout)
            self._unblock()

        thread.join = finish  # type: ignore[method-assign]
        thread.run = counted  # type: ignore[method-assign]
        thread.start = begin  # type: ignore[method-assign]
        return thread

    def condition(self) -> threading.Condition:
        clock = self

        class Watched(threading.Condition):
            waiting = 0

            def wait(self, timeout=None):
                self.waiting += 1
                clock._block()
                return super().wait(timeout=10)  # notify_all unblocks on our behalf

            def notify_all(self):
                for _ in range(self.waiting):
                    clock._unblock()
                self.waiting = 0
                super().notify_all()

        return Watched()

    def sleep(self, seconds: float) -> None:
        wake = threading.Event()
        with self._lock:
            self._sleepers.append((self._time + seconds, wake))
        self._block()
        assert wake.wait(timeout=10)

    def _unblock(self) -> None:
        with self._lock:
            self._running += 1

    def _block(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running or not self._sleepers:
                return
            self._time = min(at for at, _ in self._sleepers)
            due = [x for x in self._sleepers if x[0] == self._time]
            self._sleepers = [x for x in self._sleepers if x[0] != self._time]
            self._running += len(due)
            for _, wake in due:
                wake.set()


def run_engine(plan: Plan, on_visit: Callable[[str], None] = lambda name: None, **engine) -> list[Span]:
    """Run the expected visits of a plan on fake stores in virtual time; return the engine's spans."""
    clock = VirtualClock()
    seconds = {s.name: s for x in plan.schedule.stages for s in x.segments}
    store = FakeStore(lambda name: clock.sleep(seconds[name].load_s))
    with Engine(plan, store, clock=clock, **engine) as e:
        stages = plan.schedule.stages
        for visit in plan.schedule.visits():
            name = plan.schedule.segment(visit).name
            with e.visit(stages[visit.stage].name, name):
                clock.sleep(seconds[name].execute_s)
                on_visit(name)
        e.end_stage(stages[-1].name)
    store.close()
    return e.ledger.spans


@contextmanager
def engine_on(plan: Plan, before_load: Callable[[str], None] = lambda name: None):
    """Yield (engine, store) on a fake store; afterwards everything it loaded has been released."""
    store = FakeStore(before_load)
    with Engine(plan, store) as engine:
        yield engine, store
    store.close()
