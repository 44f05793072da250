"""The state machine that decides which segment loads next and when compute may use one.

Pure: it holds no lock, reads no clock and does no I/O. `simulate.py` drives it with a heap of
events, `engine.py` and `prefetch.py` with a lock, so what is predicted is what runs.

Two marks move over the visits in the order they run: the *cursor* is the next visit to compute, the
*front* the next to load, never behind the cursor. A load waits until no live extent overlaps its own;
what is live there is a read that ends, or belongs to an earlier visit, so waiting always ends. A
*detour* is a visit that no plan has; it comes before the cursor and leaves both marks where they are.
"""

from __future__ import annotations

from blockstream.errors import EngineError

from .arrangement import Arrangement
from .extents import LiveExtents
from .loads import Load, State
from .segments import Extent, Segment, Visit


class Scheduler:
    """Which load is next, which visit may run, what is live. Not thread-safe: callers hold a lock.

    Methods that make loads superfluous return the ones already loaded, for the caller to release;
    those still in flight are reported by `loaded` when they end.
    """

    def __init__(self, plan: Arrangement) -> None:
        self.plan = plan
        #: What is live together at most, the next visit's load excepted; None: as the plan has it.
        self.most_nbytes: int | None = None
        self._live: dict[Load, State] = {}
        self._streamed: dict[Visit, Load] = {}
        self._retained: dict[tuple[int, int], Load] = {}
        self._in_use: dict[Visit, Load] = {}
        self._extents = LiveExtents()
        self._cursor = self._first_of(0)
        self._front = self._cursor
        self._detour: Visit | None = None
        self._open: tuple[int, int] | None = None
        self._swept = 0
        self._begun = -1
        self._last_positions: dict[int, dict[int, int]] = {}

    @property
    def cursor(self) -> Visit | None:
        """Return the next planned visit to compute; None once every known one has been."""
        return self._cursor

    @property
    def live(self) -> dict[Load, State]:
        """Return what occupies the arena now, in the order it was issued."""
        return dict(self._live)

    # -- the loader's side -------------------------------------------------------------------

    def next_load(self) -> Load | None:
        """Return the load to start now, marked as loading; None while there is none to start."""
        if self._detour is not None and self._loaded_for(self._detour) is None:
            return self._issue(self._detour)
        while (visit := self._front) is not None and self._within_reach(visit):
            load = None
            if self._loaded_for(visit) is None and (load := self._issue(visit)) is None:
                return None
            self._front = self._after(visit)
            if load is not None:
                return load
        return None

    def is_wanted(self, load: Load) -> bool:
        """Return whether a load under way has not been dropped."""
        return self._live[load] is not State.DROPPED

    def loaded(self, load: Load) -> bool:
        """Mark a load as done. False: it was dropped meanwhile, its handle is to be released."""
        if self._live[load] is State.DROPPED:
            self._forget(load)
            return False
        self._live[load] = State.READY
        return True

    # -- the compute side --------------------------------------------------------------------

    def acquire(self, visit: Visit) -> Load | None:
        """Begin the visit that is next and return its load, or None while that is not there."""
        if visit != (self._detour or self._cursor):
            raise EngineError(f"{visit} is not the next visit, {self._detour or self._cursor} is")
        load = self._loaded_for(visit)
        if load is None or self._live[load] is State.LOADING:
            return None
        if self._live[load] is State.ACQUIRED:
            raise EngineError(f"segment {load.segment.name!r} is already in use")
        self._live[load] = State.ACQUIRED
        self._in_use[visit] = load
        if visit == self._detour:
            self._detour = None
            return load
        if self._front == visit:  # it was there already, and the loader has not come by
            self._front = self._after(visit)
        self._cursor = self._after(visit)
        return load

    def in_the_way(self, visit: Visit) -> Segment | None:
        """Return a segment in use where the load of a visit goes: to wait for that load would not end."""
        if self._loaded_for(visit) is None:
            extent = self.plan.extent(visit)
            for load in self._in_use.values():
                if load.extent.overlaps(extent):
                    return load.segment
        return None

    def release(self, visit: Visit) -> list[Load]:
        """End a visit. Its segment goes unless it is retained and may be used again."""
        load = self._in_use.pop(visit, None)
        if load is None:
            raise EngineError(f"{visit} is released but was not acquired")
        over = self._is_over(visit.stage)
        if load.retained and (self.plan.keeps or not (over or self._is_last_use(visit))):
            self._live[load] = State.READY
            return []
        self._forget(load)
        return [load, *self._sweep()]

    def locate(self, stage: int, segment: int) -> Visit | None:
        """Return the next visit of a segment in this pass, None when none is planned."""
        here = self._cursor
        if here is None or here.stage != stage or self._pass_of(stage) not in (None, here.pass_index):
            return None
        planned = self.plan.schedule.stages[stage]
        for position in range(here.position, len(planned.order)):
            if planned.order[position] == segment and planned.is_visited(here.pass_index, position):
                return here._replace(position=position)
        return None

    def skip_to(self, visit: Visit) -> list[Load]:
        """Move the cursor forward in its stage; the loads of the visits passed over are dropped."""
        here = self._cursor
        if here is None or visit.stage != here.stage or visit < here:
            raise EngineError(f"cannot skip from {here} to {visit}")
        freed = self._leave_detour() + self._sweep()
        self._cursor = visit
        if self._front is not None and self._front < visit:
            self._front = visit
        return freed + self._drop([x for v, x in self._streamed.items() if here <= v < visit])

    def detour(self, stage: int, segment: int) -> tuple[Visit, list[Load]]:
        """Return an unplanned visit of a segment, to be acquired before the cursor's.

        Unless the segment is there, whatever was prefetched is dropped, except what is retained out of
        the way, and the front returns to the cursor: what is live is earlier than the front again.
        """
        freed = self._leave_detour()
        here = self._cursor
        passed = self._pass_of(stage)
        if passed is None:
            passed = here.pass_index if here is not None and here.stage == stage else 0
        visit = Visit(stage, passed, self._pass_length(stage) + segment)
        self._detour = visit
        if self._loaded_for(visit) is None:
            extent = self.plan.extent(visit)
            self._front = here
            freed += self._drop([x for x in self._live if not x.retained or x.extent.overlaps(extent)])
        return visit, freed

    def begin_pass(self, stage: int) -> int | None:
        """Return the pass of a stage about to run, None past its last.

        Until it ends, its visits are looked for in this pass alone: one that comes after the last of the
        order is unplanned, not a visit of the next pass.
        """
        here = self._cursor
        self._begun = stage
        self._open = (stage, here.pass_index) if here is not None and here.stage == stage else None
        return self._pass_of(stage)

    def end_pass(self, stage: int, pass_index: int) -> list[Load]:
        """End a pass: the visits not made are passed over."""
        self._open = None
        last = Visit(stage, pass_index, self._pass_length(stage) - 1)
        here = self._cursor
        if here is None or here > last:
            return self._leave_detour()
        following = self._after(last)
        if following is not None and following.stage == last.stage:
            return self.skip_to(following)
        return self.end_stage(last.stage)

    def end_stage(self, stage: int) -> list[Load]:
        """End a stage now, whatever its number of passes; stages before it end as well."""
        for visit, load in self._in_use.items():
            if visit.stage <= stage:
                name = self.plan.schedule.stages[stage].name
                raise EngineError(
                    f"stage {name!r} is ended while its segment {load.segment.name!r} is in use"
                )
        freed = self._leave_detour()
        if self._cursor is not None and self._cursor.stage <= stage:
            self._cursor = self._first_of(stage + 1)
        if self._front is not None and self._front.stage <= stage:
            self._front = self._first_of(stage + 1)
        return freed + self._drop([x for x in self._live if x.visit.stage <= stage and not self._stays(x)])

    def goes_back(self, stage: int) -> bool:
        """Return whether a stage is before the one that began last: stages are called in turn again."""
        return stage < self._begun and not self._in_use

    def rewind(self, stage: int) -> list[Load]:
        """Go back to the first visit of a stage; what is live and does not stay is dropped."""
        freed = self._leave_detour()
        self._cursor = self._front = self._first_of(stage)
        self._swept = stage
        return freed + self._drop([x for x in self._live if not self._stays(x)])

    def adopt(self, plan: Arrangement, at: Visit | None = None) -> list[Load]:
        """Go on with another plan of the same segments, between two visits; `at` is the next one in it.

        What the stage at the cursor retains stays where the new plan retains it at the same extent, and so
        does what was loaded for the next visits, up to the first that goes elsewhere. The rest is dropped:
        a later stage's head might lie where this one's next load goes.
        """
        self._refuse_unfit(plan, at)
        if at is not None:
            stage = plan.schedule.stages[at.stage]
            self._cursor = at
            if not stage.is_visited(at.pass_index, at.position):
                before, self.plan = self.plan, plan
                self._cursor, self.plan = self._after(at), before
        moved = self.would_move(plan)
        if moved is not None:
            raise EngineError(
                f"segment {moved.name!r} is in use and the plan to adopt has it elsewhere; a plan "
                "is adopted between visits"
            )
        self.plan = plan
        stays = self._staying()
        freed = self._leave_detour()
        self._last_positions.clear()
        self._front = self._cursor
        return freed + self._drop([x for x in self._live if x not in stays])

    def would_move(self, plan: Arrangement) -> Segment | None:
        """Return a segment in use that another plan has elsewhere, None when all may stay."""
        before, self.plan = self.plan, plan
        try:
            stays = self._staying()
        finally:
            self.plan = before
        return next((x.segment for x in self._in_use.values() if x not in stays), None)

    # -- inside ------------------------------------------------------------------------------

    def _issue(self, visit: Visit) -> Load | None:
        """Return the load of a visit, marked as loading, if its room is free."""
        extent = self.plan.extent(visit)
        if not self._extents.is_free(extent) or self._is_held_back(visit, extent):
            return None
        retained = self.plan.is_retained(visit)
        stage = self.plan.schedule.stages[visit.stage]
        load = Load(stage.name, visit, self._key(visit), stage.segment(visit.position), extent, retained)
        self._extents.add(extent)
        self._live[load] = State.LOADING
        if retained:
            self._retained[load.key] = load
        else:
            self._streamed[visit] = load
        return load

    def _is_held_back(self, visit: Visit, extent: Extent) -> bool:
        """Return whether a load has to wait though its room is free: what compute needs next never does."""
        if self.most_nbytes is None or visit in (self._cursor, self._detour):
            return False
        return self._extents.nbytes + extent.nbytes > self.most_nbytes

    def _key(self, visit: Visit) -> tuple[int, int]:
        return visit.stage, self.plan.schedule.stages[visit.stage].index_at(visit.position)

    def _pass_of(self, stage: int) -> int | None:
        """Return the pass of a stage that is open, if one is."""
        return self._open[1] if self._open is not None and self._open[0] == stage else None

    def _pass_length(self, stage: int) -> int:
        return len(self.plan.schedule.stages[stage].order)

    def _loaded_for(self, visit: Visit) -> Load | None:
        return self._retained.get(self._key(visit)) or self._streamed.get(visit)

    def _is_over(self, stage: int) -> bool:
        """Return whether every visit of a stage has begun or been passed over."""
        return self._cursor is None or self._cursor.stage > stage

    def _leave_detour(self) -> list[Load]:
        """Give up an unplanned visit that was asked for but never began."""
        visit, self._detour = self._detour, None
        load = self._loaded_for(visit) if visit is not None else None
        if load is None or (load.retained and (self.plan.keeps or not self._is_over(load.visit.stage))):
            return []
        return self._drop([load])

    def _staying(self) -> set[Load]:
        """Return the loads of the plan before that the one in force has use for where they are."""
        here, plan = self._cursor, self.plan
        if here is None:
            return set()
        stays = {
            x
            for x in self._live
            if x.retained
            and (plan.keeps or x.key[0] == here.stage)
            and plan.stages[x.key[0]].layout.retained.get(x.key[1]) == x.extent
        }
        visit: Visit | None = here
        while visit is not None and visit.stage == here.stage and visit.pass_index <= here.pass_index + 1:
            load = self._loaded_for(visit)
            if load not in stays:
                streamed = self._streamed.get(visit)
                if (
                    streamed is None
                    or streamed.key != self._key(visit)
                    or plan.is_retained(visit)
                    or plan.extent(visit) != streamed.extent
                ):
                    break
                stays.add(streamed)
            visit = self._after(visit)
        return stays

    def _sweep(self) -> list[Load]:
        """Drop what stages that are over retain for visits that were then passed over."""
        now = self._cursor.stage if self._cursor is not None else len(self.plan.stages)
        if now == self._swept:
            return []
        self._swept = now
        return self._drop([x for x in self._live if x.visit.stage < now and not self._stays(x)])

    def _stays(self, load: Load) -> bool:
        """Return whether a load stays when its stage is over."""
        return self.plan.keeps and load.retained

    def _refuse_unfit(self, plan: Arrangement, at: Visit | None) -> None:
        mine, others = self.plan.schedule.stages, plan.schedule.stages
        named, wanted = ([[s.name for s in x.segments] for x in stages] for stages in (mine, others))
        if named != wanted:
            raise EngineError("the plan to adopt is for other segments; cut them before the engine starts")
        here = self._cursor if at is None else None
        if here is not None and here.position and mine[here.stage].order != others[here.stage].order:
            raise EngineError(
                f"a plan with another order of stage {mine[here.stage].name!r} is adopted at visit "
                f"{here.position} of a pass; end the pass first"
            )

    def _drop(self, loads: list[Load]) -> list[Load]:
        """Give up loads that nobody wants, those in use excepted; return the ones to release now."""
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
        if self._retained.get(load.key) is load:
            del self._retained[load.key]
        elif self._streamed.get(load.visit) is load:
            del self._streamed[load.visit]

    def _within_reach(self, visit: Visit) -> bool:
        here = self._cursor
        if here is None:
            return False
        if visit.stage != here.stage and self.plan.stages[here.stage].layout.is_scattered:
            return False  # in the holes there would be more bytes in use than planned
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
        stage = self.plan.schedule.stages[visit.stage]
        following = stage.position_from(visit.pass_index, visit.position + 1)
        if following is not None:
            return Visit(visit.stage, visit.pass_index, following)
        most = stage.passes.most
        if most is None or visit.pass_index + 1 < most:
            following = stage.position_from(visit.pass_index + 1, 0)
            if following is not None:
                return Visit(visit.stage, visit.pass_index + 1, following)
        return self._first_of(visit.stage + 1)

    def _is_last_use(self, visit: Visit) -> bool:
        """Return whether no later planned visit uses the segment; of a detour only the stage's end says."""
        stage = self.plan.schedule.stages[visit.stage]
        if visit.position >= len(stage.order):
            return False
        only = stage.order[visit.position] in stage.once
        if not only and (stage.passes.most is None or visit.pass_index + 1 < stage.passes.most):
            return False
        if visit.stage not in self._last_positions:
            last = {segment: k for k, segment in enumerate(stage.order)}
            self._last_positions[visit.stage] = last
        return self._last_positions[visit.stage][stage.order[visit.position]] == visit.position
