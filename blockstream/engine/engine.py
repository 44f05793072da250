"""Execute a plan: the compute side around the scheduler, with the loader thread beside it.

with Engine(plan, store, ledger) as engine:
    with engine.visit("t5", "block.0") as handle:
        ...compute with the segment...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from blockstream.errors import BlockstreamError, EngineError, SegmentLoadError
from blockstream.plan.loads import State
from blockstream.plan.planner import Plan
from blockstream.plan.scheduler import Scheduler
from blockstream.plan.segments import Extent, Visit

from .clock import Clock, SystemClock
from .ledger import Ledger, Track
from .loader import HOST, Lanes, Loader
from .spans import Span
from .store import Handle, Store

#: A signal that comes just before a thread sleeps is heard when it wakes: no wait is longer than this.
HEARTBEAT_S = 0.5


class Engine:
    """Hands out the segments of a plan in the order compute asks for them.

    Used by one compute thread; another may close it while that one waits. `on_executed` and `on_loaded`
    observe spans, the latter on the loader thread: what they raise ends the run. `unplanned` counts visits
    that were in no plan: they are loaded on demand. `rounds` counts how often an earlier stage began again.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        ledger: Ledger | None = None,
        clock: Clock | None = None,
        on_loaded: Callable[[Span], None] | None = None,
        on_executed: Callable[[Span], None] | None = None,
        lanes: Lanes = HOST,
    ) -> None:
        clock = clock or SystemClock()
        self.ledger = ledger if ledger is not None else Ledger(clock=clock.now)
        self.unplanned = 0
        self.rounds = 0
        self._plan = plan
        self._scheduler = Scheduler(plan)
        self._loader = Loader(self._scheduler, store, self.ledger, clock, on_loaded, self._trim, lanes)
        self._condition = self._loader.condition
        self._on_executed = on_executed
        self._held: set[Visit] = set()
        self._keep: Callable[[Iterable[Extent]], object] | None = None
        self._segments = [{s.name: i for i, s in enumerate(x.segments)} for x in plan.schedule.stages]
        self._closed = False
        self._track = self.ledger.compute if lanes.compute else Track(self.ledger, "", kept=False)

    @property
    def plan(self) -> Plan:
        """Return the plan in force."""
        return self._plan

    def start(self) -> Engine:
        """Start loading: the first segment of the first pass is read before anyone asks for it."""
        self._refuse_closed()
        self._loader.start()
        return self

    def close(self) -> None:
        """Stop loading and release every segment. Safe to call twice and after a failure."""
        with self._condition:
            first, self._closed = not self._closed, True
            self._held.clear()
        try:
            self._loader.close()
        finally:
            if first:
                self._track.mark("outside")
            self.ledger.flush()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- visits ------------------------------------------------------------------------------

    @contextmanager
    def visit(self, stage: str, segment: str) -> Iterator[Handle]:
        """Yield a segment for the length of the block."""
        at, handle = self.acquire(stage, segment)
        try:
            yield handle
        finally:
            self.release(at)

    def acquire(self, stage: str, segment: str) -> tuple[Visit, Handle]:
        """Return the visit and handle of a segment, waiting if its load is still in flight.

        The wait is recorded as a stall. A segment that is not next is skipped to, or loaded on demand.
        Raises SegmentLoadError naming the segment and cause if a load failed, EngineError once closed.
        """
        index = self.plan.schedule.index(stage)
        return self._take(lambda: self._seek(index, segment))

    def fetch(self, visit: Visit, segment: int) -> tuple[Visit, Handle]:
        """Return a segment, by number, for a visit of an engine above; as `acquire`.

        Plans of both have the same order, but for the moment in which one is adopted: what does not come
        here is loaded on demand.
        """
        return self._take(lambda: self._seek_for(visit, segment))

    def comes(self, visit: Visit, segment: int) -> bool:
        """Return whether a visit of an engine above is one that is planned here, and still to come."""
        with self._condition:
            here = self._scheduler.cursor
            stage = self.plan.schedule.stages[visit.stage]
            return (
                here is not None
                and visit >= here
                and visit.stage == here.stage
                and visit.position < len(stage.order)
                and stage.order[visit.position] == segment
                and stage.is_visited(visit.pass_index, visit.position)
            )

    def _take(self, seek: Callable[[], Visit]) -> tuple[Visit, Handle]:
        """Return the visit that `seek` finds, under the condition, and its handle once that is there."""
        self._track.mark("outside")
        with self._condition:
            self._refuse_closed()
            visit = seek()
            segment = self.plan.schedule.segment(visit).name
            while (load := self._scheduler.acquire(visit)) is None:
                self._refuse_endless_wait(visit)
                self._condition.wait(HEARTBEAT_S)
                self._refuse_closed()
            handle = self._loader.handles[load]
            self._held.add(visit)
            self._condition.notify_all()
        self._track.mark("stall", segment, visit)
        return visit, handle

    def release(self, visit: Visit) -> None:
        """End a visit; its segment goes unless the plan retains it. Once closed there is nothing to end."""
        if self._closed:
            return
        if visit not in self._held:
            raise EngineError(f"{visit} is released but was not acquired")
        span = self._track.mark("execute", self.plan.schedule.segment(visit).name, visit)
        with self._condition:
            if self._closed:
                return
            self._held.remove(visit)
            self._loader.release(self._scheduler.release(visit))
        if self._on_executed is not None:
            self._on_executed(span)

    # -- passes and stages -------------------------------------------------------------------

    def begin_pass(self, stage: str) -> int | None:
        """Make a stage current, ending earlier ones; return the pass about to run, None past the last.

        A stage before the one that began last begins anew.
        """
        index = self.plan.schedule.index(stage)
        with self._condition:
            self._refuse_closed()
            cursor = self._scheduler.cursor
            if cursor is not None and cursor.stage < index:
                self._loader.release(self._scheduler.end_stage(index - 1))
            if self._scheduler.goes_back(index):
                self._loader.release(self._scheduler.rewind(index))
                self.rounds += 1
            return self._scheduler.begin_pass(index)

    def end_pass(self, stage: str, pass_index: int | None) -> None:
        """End a pass: segments it did not visit are passed over."""
        with self._condition:
            if pass_index is None or self._closed:
                return
            index = self.plan.schedule.index(stage)
            self._loader.release(self._scheduler.end_pass(index, pass_index))

    def end_stage(self, stage: str) -> None:
        """End a stage now: what is held or being read for it is dropped, the next one's head loads."""
        with self._condition:
            if not self._closed:
                self._loader.release(self._scheduler.end_stage(self.plan.schedule.index(stage)))

    def adopt(self, plan: Plan, at: Visit | None = None) -> None:
        """Go on with another plan of the same segments, between two passes; or with visit `at` of it next."""
        with self._condition:
            self._refuse_closed()
            self._loader.release(self._scheduler.adopt(plan, at))
            self._plan = plan
        self._track.mark("replan")

    def hold_back(self, nbytes: int | None) -> None:
        """Load ahead only while no more than so much is in use; None: as far as the plan has room."""
        with self._condition:
            self._scheduler.most_nbytes = nbytes
            self._condition.notify_all()

    @property
    def most_nbytes(self) -> int | None:
        """Return what `hold_back` was last called with."""
        return self._scheduler.most_nbytes

    def can_adopt(self, plan: Plan) -> bool:
        """Return whether a plan leaves what is in use where it is."""
        with self._condition:
            return self._scheduler.would_move(plan) is None

    def kept(self) -> frozenset[int]:
        """Return the segments that the stage at the cursor retains and that are there or being read."""
        with self._condition:
            here = self._scheduler.cursor
            live = self._scheduler.live
            return frozenset(
                x.key[1] for x in live if x.retained and here is not None and x.key[0] == here.stage
            )

    def everything(self) -> list[Handle] | None:
        """Return the handles of all segments of the stage at the cursor if all are there to stay."""
        with self._condition:
            here = self._scheduler.cursor
            if here is None or self._held:
                return None
            there = {
                load.key[1]: self._loader.handles[load]
                for load, state in self._scheduler.live.items()
                if load.retained and load.key[0] == here.stage and state is State.READY
            }
            complete = len(there) == len(self.plan.schedule.stages[here.stage].segments)
            return list(there.values()) if complete else None

    def trim(self, keep: Callable[[Iterable[Extent]], object], wait: bool = False) -> None:
        """Call `keep` with the extents of the stage that runs and those in use, while no load can begin.

        It is called again whenever a dropped read ends, which writes on to where it was to go; with `wait`
        that is waited for.
        """
        with self._condition:
            self._keep = keep
            while wait and not self._closed and self._loader.failure is None and self._is_dropping():
                self._condition.wait(HEARTBEAT_S)
            self._trim()

    @property
    def cursor(self) -> Visit | None:
        """Return the next planned visit; None once every known one has been."""
        return self._scheduler.cursor

    # -- inside ------------------------------------------------------------------------------

    def _trim(self) -> None:
        """Say what is used to whom `trim` named last. The condition is held."""
        here = self._scheduler.cursor
        if self._keep is not None:
            planned = () if here is None else self.plan.stages[here.stage].layout.extents
            self._keep([*planned, *(load.extent for load in self._scheduler.live)])

    def _is_dropping(self) -> bool:
        return State.DROPPED in self._scheduler.live.values()

    def _seek(self, stage: int, segment: str) -> Visit:
        """Return the visit to acquire, moving the cursor where compute is."""
        cursor = self._scheduler.cursor
        if cursor is not None and cursor.stage < stage:
            self._loader.release(self._scheduler.end_stage(stage - 1))
        index = self._segments[stage].get(segment)
        if index is None:
            name = self.plan.schedule.stages[stage].name
            raise EngineError(f"stage {name!r} has no segment {segment!r}")
        visit = self._scheduler.locate(stage, index)
        if visit is not None:
            freed = self._scheduler.skip_to(visit)
        else:
            self.unplanned += 1
            visit, freed = self._scheduler.detour(stage, index)
        self._loader.release(freed)
        return visit

    def _seek_for(self, at: Visit, segment: int) -> Visit:
        """Return the visit to acquire for one of an engine above, moving the cursor there."""
        cursor = self._scheduler.cursor
        if cursor is not None and cursor.stage < at.stage:
            self._loader.release(self._scheduler.end_stage(at.stage - 1))
        if self.comes(at, segment):
            self._loader.release(self._scheduler.skip_to(at))
            return at
        self.unplanned += 1
        visit, freed = self._scheduler.detour(at.stage, segment)
        self._loader.release(freed)
        return visit

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; open another to go on")

    def _refuse_endless_wait(self, visit: Visit) -> None:
        """Raise if the load of a visit will not come: the loader failed, or its room is in use here."""
        failure, load = self._loader.failure, self._loader.failed
        segment = self.plan.schedule.segment(visit).name
        if not self._loader.started:
            raise EngineError(f"segment {segment!r} is asked for before the engine was started")
        if isinstance(failure, BlockstreamError):
            raise failure
        if failure is not None and load is None:
            raise EngineError(f"loading ended before segment {segment!r}: {_named(failure)}") from failure
        if failure is not None and load is not None:
            raise SegmentLoadError(
                f"segment {load.segment.name!r} could not be loaded (while {segment!r} was waited for): "
                f"{_named(failure)}"
            ) from failure
        blocker = self._scheduler.in_the_way(visit)
        if blocker is not None:
            raise EngineError(
                f"segment {segment!r} is asked for while {blocker.name!r} is in use where it would be "
                "loaded; release that one first"
            )


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
