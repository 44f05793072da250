"""Predict what a plan will do: event by event with the engine's own scheduler, or fast by recurrence.

Time is virtual: one loader, one compute thread, the seconds of each `Segment`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from .arrangement import Arrangement
from .loads import Load
from .scheduler import Scheduler
from .segments import AtMost, Exactly, Schedule, Segment, Stage, Unknown, Visit

#: More visits than this are predicted from their first passes, as later ones repeat; where a stage's passes
#: differ in time, more than the second number.
SIMULATED_VISITS, SIMULATED_PACED_VISITS = 1_000, 20_000


class Event(NamedTuple):
    """One interval of a predicted timeline: `kind` is "load" or "execute"."""

    kind: str
    visit: Visit
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StagePrediction:
    """What one stage will take. `stall_s` is compute waiting for loads; copies are those to a device."""

    name: str
    passes: int
    wall_s: float
    execute_s: float
    load_s: float
    stall_s: float
    read_nbytes: int
    copy_s: float = 0.0
    copied_nbytes: int = 0


@dataclass(frozen=True)
class Prediction:
    """What a plan will take, in all and stage by stage."""

    wall_s: float
    stages: tuple[StagePrediction, ...]

    @property
    def read_nbytes(self) -> int:
        """Return the bytes read from storage."""
        return sum(s.read_nbytes for s in self.stages)


@dataclass(frozen=True)
class Estimate:
    """What the recurrence says of one stage."""

    wall_s: float
    read_nbytes: int


def simulate(plan: Arrangement) -> list[Event]:
    """Return the timeline of the expected passes, in the order of the events' starts.

    A stage with `AtMost` or `Unknown` passes runs its expected number and is then ended.
    """
    scheduler = Scheduler(plan)
    events: list[Event] = []
    ends: list[tuple[float, int, Load | Visit]] = []
    now = 0.0
    loading = computing = False
    todo = plan.schedule.visits()
    visit = next(todo, None)
    while visit is not None:
        if scheduler.cursor is not None and scheduler.cursor.stage < visit.stage:
            scheduler.end_stage(visit.stage - 1)
        if not loading and (load := scheduler.next_load()) is not None:
            events.append(Event("load", load.visit, now, now + load.segment.load_s))
            heapq.heappush(ends, (events[-1].end_s, len(events), load))
            loading = True
        if not computing and scheduler.acquire(visit) is not None:
            pace = plan.schedule.stages[visit.stage].pace_of(visit.pass_index)
            end = now + pace * plan.schedule.segment(visit).execute_s
            events.append(Event("execute", visit, now, end))
            heapq.heappush(ends, (end, len(events), visit))
            computing = True
            continue  # a visit that began may let another load start
        assert ends, "nothing runs and nothing can start"
        # Everything that ends now ends before anything starts: ties have no order.
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, _, done = heapq.heappop(ends)
            if isinstance(done, Load):
                scheduler.loaded(done)
                loading = False
                continue
            scheduler.release(done)
            computing = False
            visit = next(todo, None)
    return events


def predict(plan: Arrangement) -> Prediction:
    """Return the simulated timeline summed by stage; long schedules from their first passes."""

    def summed(shorter: Shorter) -> Prediction:
        fewer = shorter(plan)
        return _sum(fewer, simulate(fewer))

    return extrapolated(plan.schedule, summed)


#: What makes fewer passes of an arrangement.
Shorter = Callable[[Arrangement], Arrangement]


def extrapolated(schedule: Schedule, summed: Callable[[Shorter], Prediction]) -> Prediction:
    """Return what `summed` predicts of arrangements of a schedule; of many passes from the first few."""
    visits = sum(len(s.order) * s.passes.expected for s in schedule.stages)
    paced = any(s.pace for s in schedule.stages)
    if visits <= (SIMULATED_PACED_VISITS if paced else SIMULATED_VISITS):
        return summed(lambda plan: plan)
    fewer, more = (summed(partial(_shortened, passes=n)) for n in (4, 5))
    stages = tuple(
        _extrapolate(stage.passes.expected, a, b)
        for stage, a, b in zip(schedule.stages, fewer.stages, more.stages, strict=True)
    )
    return Prediction(sum(s.wall_s for s in stages), stages)


def _shortened(plan: Arrangement, passes: int) -> Arrangement:
    def cut(stage: Stage) -> Stage:
        n = min(stage.passes.expected, passes)
        kept: Exactly | AtMost | Unknown
        if isinstance(stage.passes, Unknown):
            kept = Unknown(n)
        else:
            kept = type(stage.passes)(n)
        # Passes of the mean pace stand for all.
        paces = stage.paces(stage.passes.expected)
        mean = sum(pace * count for pace, count in paces) / max(1, stage.passes.expected)
        return replace(stage, passes=kept, pace=(mean,) * n if stage.pace else ())

    schedule = replace(plan.schedule, stages=tuple(cut(s) for s in plan.schedule.stages))
    return replace(plan, schedule=schedule)


def _extrapolate(passes: int, a: StagePrediction, b: StagePrediction) -> StagePrediction:
    if b.passes == a.passes:
        return b
    k = passes - b.passes
    return StagePrediction(
        b.name,
        passes,
        b.wall_s + k * (b.wall_s - a.wall_s),
        b.execute_s + k * (b.execute_s - a.execute_s),
        b.load_s + k * (b.load_s - a.load_s),
        max(0.0, b.stall_s + k * (b.stall_s - a.stall_s)),
        b.read_nbytes + k * (b.read_nbytes - a.read_nbytes),
        b.copy_s + k * (b.copy_s - a.copy_s),
        b.copied_nbytes + k * (b.copied_nbytes - a.copied_nbytes),
    )


def _sum(plan: Arrangement, events: list[Event]) -> Prediction:
    """Sum a timeline by stage. A stage's wall time runs from the end of the stage before to its own."""
    stages = []
    begin = 0.0
    for i, stage in enumerate(plan.schedule.stages):
        mine = [e for e in events if e.visit.stage == i]
        executed = [e for e in mine if e.kind == "execute"]
        loads = [e for e in mine if e.kind == "load"]
        end = executed[-1].end_s if executed else begin
        execute_s = sum(e.end_s - e.start_s for e in executed)
        read = sum(plan.schedule.segment(e.visit).streamed_nbytes for e in loads)
        load_s = sum(e.end_s - e.start_s for e in loads)
        stall_s = max(0.0, end - begin - execute_s)
        stages.append(
            StagePrediction(stage.name, stage.passes.expected, end - begin, execute_s, load_s, stall_s, read)
        )
        begin = end
    return Prediction(begin, tuple(stages))


def estimate(
    stage: Stage,
    retained: Collection[int],
    slots: int,
    lookahead: int | None = None,
    there: Collection[int] = (),
) -> Estimate:
    """Return the time of one stage by itself for equal slots in rotation: O(passes x visits).

    What is retained and `there` needs no load.

    load_start[n] = max(load_end[n-1], release[n - slots]), execute_start = max(execute_end of the
    visit before, load_end). Of passes of one pace only a few are run; later ones repeat the last.
    """
    clock = _Recurrence(stage, retained, slots, lookahead, there)
    most = max(3, min(slots + 2, SIMULATED_PACED_VISITS // max(len(stage.order), 1)))
    for pace, count in stage.paces(stage.passes.expected):
        before = clock.now, clock.read_nbytes
        for _ in range(min(count, most)):
            before = clock.now, clock.read_nbytes
            clock.run_pass(pace)
        clock.repeat(count - most, clock.now - before[0], clock.read_nbytes - before[1])
    return Estimate(clock.now, clock.read_nbytes)


class _Recurrence:
    """When loader and compute are free, pass after pass of one stage."""

    def __init__(
        self,
        stage: Stage,
        retained: Collection[int],
        slots: int,
        lookahead: int | None,
        there: Collection[int],
    ) -> None:
        self._stage, self._retained, self._slots, self._lookahead = stage, retained, slots, lookahead
        self._passes = 0
        self.now = 0.0
        self.read_nbytes = 0
        self._loader = 0.0
        self._loaded_at: dict[int, float] = dict.fromkeys((i for i in there if i in retained), 0.0)
        self._released = deque([0.0] * slots, maxlen=slots)
        self._begun: deque[float] = deque(maxlen=lookahead or 0)

    def run_pass(self, pace: float) -> None:
        """Go through one pass."""
        positions = self._stage.positions(self._passes)
        self._passes += 1
        for i in map(self._stage.order.__getitem__, positions):
            segment = self._stage.segments[i]
            ready = self._loaded_at.get(i)
            if ready is None:
                ready = self._load(i, segment)
            begin = max(self.now, ready)
            self._begun.append(begin)
            self.now = begin + pace * segment.execute_s
            if i not in self._retained:
                self._released.append(self.now)

    def _load(self, i: int, segment: Segment) -> float:
        start = self._loader
        if i not in self._retained:
            start = max(start, self._released[0])
        if self._lookahead is not None and len(self._begun) == self._lookahead:
            start = max(start, self._begun[0])
        self._loader = start + segment.load_s
        self.read_nbytes += segment.streamed_nbytes
        if i in self._retained:
            self._loaded_at[i] = self._loader
        return self._loader

    def repeat(self, passes: int, seconds: float, nbytes: int) -> None:
        """Let more passes like the last go by: the whole picture moves on in time."""
        if passes <= 0:
            return
        later = passes * seconds
        self.now += later
        self._loader += later
        self.read_nbytes += passes * nbytes
        self._released = deque((t + later for t in self._released), maxlen=self._slots)
        self._begun = deque((t + later for t in self._begun), maxlen=self._lookahead or 0)
