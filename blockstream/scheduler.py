"""The state machine that decides which segment loads next and when compute may use one.

Pure: it holds no lock, reads no clock and does no I/O. `simulate.py` drives it with a heap of
events, `engine.py` and `prefetch.py` with a lock, so what is predicted is what runs.

Two marks move over the visits in the order they run: the *cursor* is the next visit to compute, the
*front* the next to load. A load waits until no live extent overlaps its own; whatever is live belongs
to an earlier visit, so waiting always ends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import Enum

from .errors import EngineError
from .plan import Plan
from .segments import Extent, Segment, Visit


@dataclass(frozen=True, eq=False, slots=True)
class Load:
    """One load: the visit it is for, where its bytes go, whether it stays across passes.

    Compared by identity: a visit whose load was dropped may be loaded again.
    """

    visit: Visit
    segment: Segment
    extent: Extent
    retained: bool


class State(Enum):
    """The life of a load; LOADING loads that nobody wants any more are DROPPED."""

    LOADING = "loading"
    READY = "ready"
    ACQUIRED = "acquired"
    DROPPED = "dropped"


class _LiveExtents:
    """Disjoint extents sorted by offset: overlap in O(log n)."""

    def __init__(self) -> None:
        self._sorted: list[Extent] = []

    def add(self, extent: Extent) -> None:
        if extent.nbytes:
            insort(self._sorted, extent)

    def remove(self, extent: Extent) -> None:
        if extent.nbytes:
            at = bisect_left(self._sorted, extent)
            assert self._sorted[at] == extent, "an extent is freed once"
            del self._sorted[at]

    def is_free(self, extent: Extent) -> bool:
        if not extent.nbytes:
            return True
        at = bisect_left(self._sorted, extent)
        around = self._sorted[max(at - 1, 0) : at + 1]
        return not any(live.overlaps(extent) for live in around)


class Scheduler:
    """Which load is next, which visit may run, what is live. Not thread-safe: callers hold a lock.

    Methods that make loads superfluous return the ones already loaded, for the caller to release;
    those still in flight are reported by `loaded` when they end.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._live: dict[Load, State] = {}
        self._streamed: dict[Visit, Load] = {}
        self._retained: dict[tuple[int, int], Load] = {}
        self._extents = _LiveExtents()
        self._cursor = self._first_of(0)
        self._front = self._cursor
        self._resume: Visit | None = None
        self._last_positions: dict[int, dict[int, int]] = {}

    @property
    def cursor(self) -> Visit | None:
        """Return the next visit to compute; None once every known visit has been."""
        return self._cursor

    @property
    def live(self) -> dict[Load, State]:
        """Return what occupies the arena now, in the order it was issued."""
        return dict(self._live)

    # -- the loader's side -------------------------------------------------------------------

    def next_load(self) -> Load | None:
        """Return the load to start now, marked as loading; None while there is none to start."""
        while (visit := self._front) is not None and self._within_reach(visit):
            if self._loaded_for(visit) is not None:
                self._front = self._after(visit)
                continue
            extent = self.plan.extent(visit)
            if not self._extents.is_free(extent):
                return None
            load = Load(visit, self._segment(visit), extent, self.plan.is_retained(visit))
            self._extents.add(extent)
            self._live[load] = State.LOADING
            if load.retained:
                self._retained[self._key(visit)] = load
            else:
                self._streamed[visit] = load
            self._front = self._after(visit)
            return load
        return None

    def loaded(self, load: Load) -> bool:
        """Mark a load as done. False: it was dropped meanwhile, its handle is to be released."""
        if self._live[load] is State.DROPPED:
            self._forget(load)
            return False
        self._live[load] = State.READY
        return True

    # -- the compute side --------------------------------------------------------------------

    def acquire(self, visit: Visit) -> Load | None:
        """Begin the visit at the cursor and return its load, or None while that is not there."""
        if visit != self._cursor:
            raise EngineError(f"{visit} is not the next visit, {self._cursor} is")
        load = self._loaded_for(visit)
        if load is None or self._live[load] is State.LOADING:
            return None
        if self._live[load] is State.ACQUIRED:
            raise EngineError(f"segment {load.segment.name!r} is already in use")
        self._live[load] = State.ACQUIRED
        self._cursor = self._after(visit)
        return load

    def release(self, visit: Visit) -> Load | None:
        """End a visit. Return its load when the segment goes, None when it stays."""
        load = self._loaded_for(visit)
        if load is None or self._live[load] is not State.ACQUIRED:
            raise EngineError(f"{visit} is released but was not acquired")
        if load.retained and not self._is_last_use(visit):
            self._live[load] = State.READY
            return None
        self._forget(load)
        return load

    def locate(self, stage: int, segment: int) -> Visit | None:
        """Return the next visit of a segment in the pass at the cursor, None when none is planned."""
        here = self._cursor
        if here is None or here.stage != stage:
            return None
        order = self.plan.schedule.stages[stage].order
        for position in range(here.position, len(order)):
            if order[position] == segment:
                return here._replace(position=position)
        return None

    def skip_to(self, visit: Visit) -> list[Load]:
        """Move the cursor forward in its stage; the loads of the visits passed over are dropped."""
        here = self._cursor
        if here is None or visit.stage != here.stage or visit < here:
            raise EngineError(f"cannot skip from {here} to {visit}")
        self._cursor = visit
        if self._front is not None and self._front < visit:
            self._front = visit
        return self._drop([x for v, x in self._streamed.items() if here <= v < visit])

    def detour(self, stage: int, segment: int) -> list[Load]:
        """Put an unplanned visit of a segment before the cursor: `cursor` is then that visit.

        Whatever was prefetched is dropped unless it is retained out of the way, and the front
        returns to the cursor, so that what is live is earlier than the front again.
        """
        here = self._cursor
        passed = here.pass_index if here is not None and here.stage == stage else 0
        visit = Visit(stage, passed, len(self.plan.schedule.stages[stage].order) + segment)
        self._resume = here
        self._cursor = self._front = visit
        if self._loaded_for(visit) is not None:
            return []
        extent = self.plan.extent(visit)
        return self._drop([x for x in self._live if not x.retained or x.extent.overlaps(extent)])

    def end_pass(self, stage: int, pass_index: int) -> list[Load]:
        """End a pass: the visits not made are passed over."""
        last = Visit(stage, pass_index, self._pass_length(stage) - 1)
        here = self._cursor
        if here is None or here > last:
            return []
        following = self._after(last)
        if following is not None and following.stage == last.stage:
            return self.skip_to(following)
        return self.end_stage(last.stage)

    def end_stage(self, stage: int) -> list[Load]:
        """End a stage now, whatever its number of passes; stages before it end as well."""
        doomed = [x for x in self._live if x.visit.stage <= stage]
        used = [x.segment.name for x in doomed if self._live[x] is State.ACQUIRED]
        if used:
            name = self.plan.schedule.stages[stage].name
            raise EngineError(f"stage {name!r} is ended while its segment {used[0]!r} is in use")
        if self._cursor is not None and self._cursor.stage <= stage:
            self._cursor = self._first_of(stage + 1)
        if self._front is not None and self._front.stage <= stage:
            self._front = self._first_of(stage + 1)
        return self._drop(doomed)

    def adopt(self, plan: Plan) -> list[Load]:
        """Go on with another plan of the same stages: at a pass boundary, nothing in use.

        Retained segments stay where the new plan retains them at the same extent; the rest is dropped.
        """
        if State.ACQUIRED in self._live.values():
            raise EngineError("a plan is adopted between visits only")
        self.plan = plan
        self._last_positions.clear()
        doomed = []
        for load in self._live:
            stage = plan.stages[load.visit.stage]
            names = [s.name for s in plan.schedule.stages[load.visit.stage].segments]
            at = stage.layout.retained.get(names.index(load.segment.name))
            if not load.retained or at != load.extent:
                doomed.append(load)
        self._front = self._cursor
        return self._drop(doomed)

    # -- inside ------------------------------------------------------------------------------

    def _segment(self, visit: Visit) -> Segment:
        return self.plan.schedule.segment(visit)

    def _key(self, visit: Visit) -> tuple[int, int]:
        return visit.stage, self.plan.schedule.stages[visit.stage].index_at(visit.position)

    def _pass_length(self, stage: int) -> int:
        return len(self.plan.schedule.stages[stage].order)

    def _loaded_for(self, visit: Visit) -> Load | None:
        return self._retained.get(self._key(visit)) or self._streamed.get(visit)

    def _drop(self, loads: list[Load]) -> list[Load]:
        freed = []
        for load in loads:
            state = self._live[load]
            if state is State.READY:
                self._forget(load)
                freed.append(load)
            elif state is State.LOADING:
                # Its extent stays live until the read ends; the visit may be loaded again.
                self._live[load] = State.DROPPED
                self._unlink(load)
        return freed

    def _forget(self, load: Load) -> None:
        self._extents.remove(load.extent)
        del self._live[load]
        self._unlink(load)

    def _unlink(self, load: Load) -> None:
        if self._retained.get(self._key(load.visit)) is load:
            del self._retained[self._key(load.visit)]
        elif self._streamed.get(load.visit) is load:
            del self._streamed[load.visit]

    def _within_reach(self, visit: Visit) -> bool:
        here = self._cursor
        if here is None:
            return False
        # Passes that need no load must not send the front round and round.
        passed = here.pass_index if here.stage == visit.stage else 0
        if visit.pass_index > passed + 2:
            return False
        limit = self.plan.lookahead
        return limit is None or self._ahead(visit, limit) < limit

    def _ahead(self, visit: Visit, limit: int) -> int:
        """Return how many visits lie between the cursor and `visit`, counted no further than `limit`."""
        at, n = self._cursor, 0
        while at is not None and at < visit and n < limit:
            at, n = self._after(at), n + 1
        return n

    def _first_of(self, stage: int) -> Visit | None:
        """Return the first visit of the first stage from `stage` on that has any pass."""
        for s in range(stage, len(self.plan.schedule.stages)):
            if self.plan.schedule.stages[s].passes.most != 0:
                return Visit(s, 0, 0)
        return None

    def _after(self, visit: Visit) -> Visit | None:
        """Return the visit after `visit` as far as is known; past an exact end lies the next stage."""
        if visit.position >= self._pass_length(visit.stage):
            return self._resume
        if visit.position + 1 < self._pass_length(visit.stage):
            return Visit(visit.stage, visit.pass_index, visit.position + 1)
        most = self.plan.schedule.stages[visit.stage].passes.most
        if most is None or visit.pass_index + 1 < most:
            return Visit(visit.stage, visit.pass_index + 1, 0)
        return self._first_of(visit.stage + 1)

    def _is_last_use(self, visit: Visit) -> bool:
        stage = self.plan.schedule.stages[visit.stage]
        if stage.passes.most is None or visit.pass_index + 1 < stage.passes.most:
            return False
        if visit.position >= len(stage.order):  # a detour: only the end of the stage is certain
            return self._cursor is None or self._cursor.stage > visit.stage
        if visit.stage not in self._last_positions:
            last = {segment: k for k, segment in enumerate(stage.order)}
            self._last_positions[visit.stage] = last
        return self._last_positions[visit.stage][stage.order[visit.position]] == visit.position
