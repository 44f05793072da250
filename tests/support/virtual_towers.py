"""Two engines, one over the other, on a device whose queues last virtual seconds: no disk, no data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from blockstream.device.rooms import Readers
from blockstream.device.upload import UploadStore
from blockstream.engine.engine import Engine
from blockstream.engine.loader import Lanes
from blockstream.plan.simulate import Event
from blockstream.plan.tiers import Tiers
from tests.support.fakes import FakeStore, VirtualClock


class End:
    """A fence that is over at a time."""

    def __init__(self, clock: VirtualClock, at: float) -> None:
        self.clock, self.at = clock, at

    def is_over(self) -> bool:
        return self.clock.now() >= self.at

    def wait(self) -> None:
        if not self.is_over():
            self.clock.sleep(self.at - self.clock.now())


class TimedDevice:
    """Two queues of known lengths: what is issued is over once what it comes after is, and it has lasted."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.until = {"copies": 0.0, "compute": 0.0}

    def last(self, queue: str, seconds: float) -> tuple[float, float]:
        begin = max(self.clock.now(), self.until[queue])
        self.until[queue] = begin + seconds
        return begin, begin + seconds

    def copies_wait(self, fence: End) -> None:
        self.until["copies"] = max(self.until["copies"], fence.at)

    def compute_waits(self, fence: End) -> None:
        self.until["compute"] = max(self.until["compute"], fence.at)

    def computed(self) -> End:
        return End(self.clock, self.until["compute"])

    def synchronise(self) -> None:
        pass


class TimedStore(UploadStore):
    """Queues a copy that lasts as long as its segment says."""

    def __init__(self, events: list[Event], *args: Any) -> None:
        super().__init__(*args)
        self.events = events

    def queue(self, load, handle):
        for fence in self.arena.readers(load.extent):
            self.device.copies_wait(fence)
        begin, end = self.device.last("copies", load.segment.copy_s)
        self.events.append(Event("copy", load.visit, begin, end))
        return End(self.device.clock, end)


def run_towers(tiers: Tiers) -> tuple[list[Event], float]:
    """Run the expected visits of the plans of both tiers.

    Return what disk, link and device did, and when the host had issued the last visit.
    """
    clock = VirtualClock()
    seconds = {s.name: s.load_s for x in tiers.host.schedule.stages for s in x.segments}
    events: list[Event] = []
    disk = FakeStore(lambda name: clock.sleep(seconds[name]))
    host = Engine(tiers.host, disk, clock=clock, lanes=Lanes(compute=""))
    device = TimedDevice(clock)
    pinned = SimpleNamespace(unregister=lambda: None)
    store = TimedStore(events, host, pinned, device, Readers(), {})
    top = Engine(tiers.device, store, clock=clock, lanes=Lanes(loader="link", load="copy"))
    host.start()
    top.start()
    stages = tiers.device.schedule.stages
    for visit in tiers.device.schedule.visits():
        stage, segment = stages[visit.stage], tiers.device.schedule.segment(visit)
        at, handle = top.acquire(stage.name, segment.name)
        handle.read()
        pace = stage.pace_of(visit.pass_index)
        events.append(Event("execute", visit, *device.last("compute", pace * segment.execute_s)))
        top.release(at)
    issued = clock.now()
    assert top.unplanned == host.unplanned == 0
    top.end_stage(stages[-1].name)
    top.close()
    store.close()
    loads = [s for s in host.ledger.spans if s.kind == "load" and s.visit is not None]
    return events + [Event("load", s.visit, s.start_s, s.end_s) for s in loads], issued
