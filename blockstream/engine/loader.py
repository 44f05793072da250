"""The loader thread: it asks the scheduler what to load next and loads it.

While one load ends the next may begin, where its room is free and the store can: the disk does not wait
for what comes after the last read. Shares one condition with the engine. Everything the scheduler holds,
and `handles`, is touched only under it; the store works without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, NoReturn

from blockstream.plan.loads import Load
from blockstream.plan.scheduler import Scheduler

from .clock import Clock
from .ledger import Ledger
from .spans import Span
from .store import Handle, Loading, Store, Whole


class Lanes(NamedTuple):
    """What the ledger calls an engine's compute thread ("" leaves no spans), its loader and a load."""

    compute: str = "compute"
    loader: str = "loader"
    load: str = "load"


#: An engine between disk and memory.
HOST = Lanes()


class Loader:
    """One thread that loads segments in schedule order until it is closed or something fails.

    `failure` is the exception that ended it, for the compute thread to raise; `failed` the load it came
    from, None when it came from elsewhere. `on_dropped` is called, under the condition, when a read ends
    that nobody wants any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: Store,
        ledger: Ledger,
        clock: Clock,
        on_loaded: Callable[[Span], None] | None = None,
        on_dropped: Callable[[], None] = lambda: None,
        lanes: Lanes = HOST,
    ) -> None:
        self.condition = clock.condition()
        self.handles: dict[Load, Handle] = {}
        self.failure: BaseException | None = None
        self.failed: Load | None = None
        self._scheduler = scheduler
        self._store = store
        self._ledger = ledger
        self._on_loaded = on_loaded
        self._on_dropped = on_dropped
        self._lanes = lanes
        self._closing = False
        #: The load begun while the last one ended.
        self._begun: tuple[Load, Loading] | None = None
        self._thread = clock.thread(
            threading.Thread(target=self._run, name=f"blockstream-{lanes.loader}", daemon=True)
        )

    @property
    def started(self) -> bool:
        """Return whether the thread was started, even if it has ended since."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Start loading."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the load in flight, join it and release every handle left.

        Safe to call again, as after a Ctrl-C that ended the first call.
        """
        with self.condition:
            self._closing = True
            self.condition.notify_all()
        try:
            if self.started:
                self._thread.join()
        finally:
            with self.condition:
                handles, self.handles = self.handles, {}
            with ExitStack() as stack:  # all of them, whichever raises
                for handle in handles.values():
                    stack.callback(handle.release)

    def release(self, loads: list[Load]) -> None:
        """Release the handles of loads that the scheduler freed. The condition is held."""
        try:
            for load in loads:
                self.handles.pop(load).release()
        finally:
            self.condition.notify_all()

    def _run(self) -> None:
        try:
            self._load_until_closed()
        except BaseException as error:  # whatever it is, the compute thread must not wait for ever
            with self.condition:
                self.failure = error
                self.condition.notify_all()
        finally:
            if self._begun is not None:
                self._begun[1].abandon()

    def _load_until_closed(self) -> None:
        track, kind = self._ledger.track(self._lanes.loader), self._lanes.load
        while (begun := self._next()) is not None:
            load, loading = begun
            track.mark("idle")
            try:
                handle = loading.finish(self._begin_another)
            except BaseException:
                self.failed = load
                track.mark(kind, load.segment.name, load.visit)
                raise
            span = track.mark(kind, load.segment.name, load.visit, load.segment.streamed_nbytes)
            with self.condition:
                if self._scheduler.loaded(load) and not self._closing:
                    self.handles[load] = handle
                else:
                    handle.release()
                    self._on_dropped()
                self.condition.notify_all()
            if self._on_loaded is not None:
                self._on_loaded(span)
        track.mark("idle")

    def _next(self) -> tuple[Load, Loading] | None:
        """Return the next load, begun, waiting until there is one; None at close."""
        if self._begun is not None:
            (load, loading), self._begun = self._begun, None
            with self.condition:
                if not self._closing and self._scheduler.is_wanted(load):
                    return load, loading
            loading.abandon()
            with self.condition:
                self._scheduler.loaded(load)
                self._on_dropped()
                self.condition.notify_all()
        awaited = self._await_load()
        return None if awaited is None else (awaited, self._begin(awaited))

    def _await_load(self) -> Load | None:
        """Return the next load, waiting until there is one; None at close."""
        with self.condition:
            while not self._closing:
                load = self._scheduler.next_load()
                if load is not None:
                    return load
                self.condition.wait()
        return None

    def _begin_another(self) -> None:
        """Begin the load after the one under way, unless that is done or its room is not free yet."""
        if self._begun is None:
            with self.condition:
                load = None if self._closing else self._scheduler.next_load()
            if load is not None:
                self._begun = load, self._begin(load)

    def _begin(self, load: Load) -> Loading:
        """Begin a load; what is wrong with it is raised at its end, where the segment is needed."""
        try:
            return self._store.begin(load)
        except Exception as error:
            return Whole(partial(_raise, error))


def _raise(error: Exception) -> NoReturn:
    raise error
