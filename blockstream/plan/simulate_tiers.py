"""Predict what a device over host memory will do: both schedulers, a lane each for disk, link and compute.

Three threads take turns in virtual time as the engines' do: the loader below, the loader above, which is the
compute side of the one below and issues copies, and compute, whose host runs ahead of the device. What the
host does takes no time; copies and visits last as their segments say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .arrangement import Arrangement
from .loads import Load
from .scheduler import Scheduler
from .segments import Extent, Visit
from .simulate import Event, Prediction, StagePrediction, extrapolated

#: Copies that may be under way at once; the thread that issues them waits for the first of more.
IN_FLIGHT = 16


class _Towers:
    """The state that the three threads share, and the time."""

    def __init__(self, device: Arrangement, host: Arrangement) -> None:
        self.device, self.host = device, host
        self.upper, self.lower = Scheduler(device), Scheduler(host)
        self.events: list[Event] = []
        self.now = 0.0
        #: Whether something has changed that a thread may wait for.
        self._changed = False
        #: When the link and the device have done what was issued.
        self._link_s = self._compute_s = 0.0
        self._ready: dict[Load, float] = {}
        self._read: set[Load] = set()
        #: Extents of the device and until when they are read.
        self._left: list[tuple[Extent, float]] = []

    def run(self) -> list[Event]:
        """Return the events in the order they were issued."""
        compute = self._compute()
        threads: dict[Iterator[float | None], float | None] = dict.fromkeys(
            (self._disk(), self._link(), compute)
        )
        while compute in threads:
            self._changed = True
            while self._changed:
                self._changed = False
                for thread, until in list(threads.items()):
                    if until is None or until <= self.now:
                        self._go_on(threads, thread)
            due = [until for until in threads.values() if until is not None]
            if compute in threads:
                assert due, "nothing runs and nothing can start"
                self.now = min(due)
        return self.events

    def _go_on(
        self, threads: dict[Iterator[float | None], float | None], thread: Iterator[float | None]
    ) -> None:
        try:
            threads[thread] = next(thread)
        except StopIteration:
            del threads[thread]

    # Each thread yields when it is to go on: a time, or None for once something has changed.

    def _disk(self) -> Iterator[float | None]:
        while True:
            load = self.lower.next_load()
            if load is None:
                yield None
                continue
            end = self.now + load.segment.load_s
            self.events.append(Event("load", load.visit, self.now, end))
            yield end
            self.lower.loaded(load)
            self._changed = True

    def _link(self) -> Iterator[float | None]:
        flying: deque[tuple[float, Visit, tuple[int, int]]] = deque()
        while True:
            load = self.upper.next_load()
            if load is None:
                yield None
                continue
            comes = self._comes(load)
            while flying:
                end, below, _ = flying[0]
                beside = comes and all(key != load.key and key[0] == load.key[0] for _, _, key in flying)
                if beside and len(flying) < IN_FLIGHT and end > self.now:
                    break
                if end > self.now:
                    yield end
                flying.popleft()
                self.lower.release(below)
                self._changed = True
            below = self._seek(load)
            self._changed = True
            while self.lower.acquire(below) is None:
                yield None
            self._changed = True
            end = self._copied(load)
            if self.host.is_retained(below):
                flying.append((end, below, load.key))
            else:
                if end > self.now:
                    yield end
                self.lower.release(below)
            self.upper.loaded(load)
            self._changed = True

    def _compute(self) -> Iterator[float | None]:
        for visit in self.device.schedule.visits():
            if self.upper.cursor is not None and self.upper.cursor.stage < visit.stage:
                self._leave(self.upper.end_stage(visit.stage - 1))
            while (load := self.upper.acquire(visit)) is None:
                yield None
            stage = self.device.schedule.stages[visit.stage]
            begin = max(self.now, self._compute_s, self._ready[load])
            end = begin + stage.pace_of(visit.pass_index) * load.segment.execute_s
            self._compute_s = end
            self.events.append(Event("execute", visit, begin, end))
            self._read.add(load)
            self._leave(self.upper.release(visit))

    def _leave(self, freed: list[Load]) -> None:
        """Give extents up: what was read there may be read until all that was issued is over."""
        self._changed = True
        left = [(load.extent, self._compute_s) for load in freed if load in self._read]
        self._left = [(x, s) for x, s in self._left if s > self.now] + left

    def _copied(self, load: Load) -> float:
        """Issue a copy behind the readers of where it goes; return when it is over."""
        read = [end for extent, end in self._left if extent.overlaps(load.extent)]
        begin = max(self.now, self._link_s, *read)
        self._link_s = self._ready[load] = begin + load.segment.copy_s
        self.events.append(Event("copy", load.visit, begin, self._link_s))
        return self._link_s

    def _comes(self, load: Load) -> bool:
        """Return whether a visit is planned below and still to come, in the stage that runs there."""
        here, visit = self.lower.cursor, load.visit
        stage = self.host.schedule.stages[visit.stage]
        return (
            here is not None
            and visit >= here
            and visit.stage == here.stage
            and visit.position < len(stage.order)
            and stage.order[visit.position] == load.key[1]
            and stage.is_visited(visit.pass_index, visit.position)
        )

    def _seek(self, load: Load) -> Visit:
        """Move the lower cursor to the visit of a load above."""
        cursor = self.lower.cursor
        if cursor is not None and cursor.stage < load.visit.stage:
            self.lower.end_stage(load.visit.stage - 1)
        if self._comes(load):
            self.lower.skip_to(load.visit)
            return load.visit
        return self.lower.detour(load.visit.stage, load.key[1])[0]


def simulate_tiers(device: Arrangement, host: Arrangement) -> list[Event]:
    """Return the timeline of the expected passes: events of kind "load" (disk), "copy" (link) and "execute".

    Segments of `device` have `copy_s`, those of `host` `load_s`.
    """
    return _Towers(device, host).run()


def predict_tiers(device: Arrangement, host: Arrangement) -> Prediction:
    """Return the simulated timeline summed by stage; long schedules from their first passes."""
    return extrapolated(
        device.schedule,
        lambda shorter: _sum(*(shorter(x) for x in (device, host))),
    )


def _sum(device: Arrangement, host: Arrangement) -> Prediction:
    events, stages, begin = simulate_tiers(device, host), [], 0.0
    for i, stage in enumerate(device.schedule.stages):
        by_kind = {
            kind: [e for e in events if e.visit.stage == i and e.kind == kind]
            for kind in ("load", "copy", "execute")
        }
        seconds = {kind: sum(e.end_s - e.start_s for e in mine) for kind, mine in by_kind.items()}
        end = by_kind["execute"][-1].end_s if by_kind["execute"] else begin
        stages.append(
            StagePrediction(
                stage.name,
                stage.passes.expected,
                end - begin,
                seconds["execute"],
                seconds["load"],
                max(0.0, end - begin - seconds["execute"]),
                sum(host.schedule.segment(e.visit).streamed_nbytes for e in by_kind["load"]),
                seconds["copy"],
                sum(device.schedule.segment(e.visit).copied_nbytes for e in by_kind["copy"]),
            )
        )
        begin = end
    return Prediction(begin, tuple(stages))
