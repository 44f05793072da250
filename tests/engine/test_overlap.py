"""A store that can begin a load while another ends: what is begun, given up, and kept apart.

Every store of these tests checks that no two live rooms overlap and that every load ends, by a handle that
is released or by being given up.
"""

from __future__ import annotations

import threading

import pytest

from blockstream.engine.engine import Engine
from blockstream.engine.store import Loading, StagesStore
from blockstream.errors import SegmentLoadError
from blockstream.plan.segments import Extent
from tests.support.fakes import UNIT, FakeHandle, FakeStore, a_load, stage
from tests.support.interleaving import WAIT, planned, run_pass


class Begun:
    def __init__(self, store, name, room):
        self.store, self.handle = store, FakeHandle(store, name, room)
        store.live.append(self.handle)

    def finish(self, nearly):
        store, name = self.store, self.handle.name
        for round_index in range(2):
            store.before_nearly(name, round_index)
            nearly()
        store.events.append(("end", name))
        if name in store.broken:
            store.live.remove(self.handle)
            raise OSError("the disk is gone")
        return self.handle

    def abandon(self):
        self.store.events.append(("abandon", self.handle.name))
        self.store.live.remove(self.handle)


class Overlapping(FakeStore):
    """Loads as `FakeStore`, in two steps; `before_nearly` is called before each of two calls of nearly."""

    def __init__(self, before_nearly=lambda name, round_index: None):
        super().__init__()
        self.events, self.before_nearly, self.broken, self.unknown = [], before_nearly, set(), set()

    def begin(self, load):
        segment, room = load.segment.name, load.extent
        if segment in self.unknown:
            raise SegmentLoadError(f"there is no segment {segment!r}")
        for other in list(self.live):
            assert not other.room.overlaps(room), f"{segment} is loaded over {other.name}"
        self.events.append(("begin", segment))
        return Begun(self, segment, room)


def held_in_its_end(name):
    """Return what holds a load after it has begun another, whether it does, and what lets it go on."""
    begun, go_on = threading.Event(), threading.Event()

    def before(segment, round_index):
        if (segment, round_index) == (name, 1):
            begun.set()
            assert go_on.wait(WAIT)

    return before, begun, go_on


def when(store, event):
    return store.events.index(event)


def test_a_load_begins_while_the_one_before_it_ends():
    store = Overlapping()
    with Engine(planned(units=4, slots=4), store) as engine:
        run_pass(engine)
    for i in range(3):
        assert when(store, ("begin", f"s.{i + 1}")) < when(store, ("end", f"s.{i}"))
    assert [name for what, name in store.events if what == "end"] == [f"s.{i}" for i in range(4)]
    store.close()


def test_no_more_than_one_load_is_begun_ahead():
    store = Overlapping()
    with Engine(planned(units=4, slots=4), store) as engine:
        run_pass(engine)
    for i in range(2):
        assert when(store, ("begin", f"s.{i + 2}")) > when(store, ("end", f"s.{i}"))
    store.close()


def test_a_load_whose_room_is_taken_begins_as_soon_as_it_is_free():
    released = threading.Event()

    def before(name, round_index):
        if (name, round_index) == ("s.1", 1):
            assert released.wait(WAIT)

    store = Overlapping(before)
    with Engine(planned(units=2, slots=2), store) as engine:
        with engine.visit("s", "s.0"):
            assert ("begin", "s.2") not in store.events
        released.set()
        for i in (1, 2, 3):
            with engine.visit("s", f"s.{i}"):
                pass
    assert when(store, ("begin", "s.2")) < when(store, ("end", "s.1"))
    store.close()


def test_what_was_begun_is_given_up_when_the_load_before_it_fails():
    store = Overlapping()
    store.broken = {"s.1"}
    with Engine(planned(units=4, slots=4), store) as engine:
        with engine.visit("s", "s.0"):
            pass
        with pytest.raises(SegmentLoadError, match=r"'s.1' could not be loaded.*the disk is gone"):
            engine.acquire("s", "s.1")
    assert store.events[-1] == ("abandon", "s.2")
    store.close()


def test_what_was_begun_is_given_up_at_close():
    before, begun, closing = held_in_its_end("s.0")
    store = Overlapping(before)
    engine = Engine(planned(units=4, slots=4), store).start()
    assert begun.wait(WAIT)
    notify = engine._condition.notify_all
    engine._condition.notify_all = lambda: (closing.set(), notify())
    engine.close()
    assert ("abandon", "s.1") in store.events and ("end", "s.1") not in store.events
    store.close()


def test_what_was_begun_and_is_not_wanted_any_more_is_given_up_and_not_waited_for():
    before, begun, skipped = held_in_its_end("s.0")
    store = Overlapping(before)
    with Engine(planned(stage(), stage("t"), units=4, slots=4), store) as engine:
        assert begun.wait(WAIT)
        engine.end_stage("s")
        skipped.set()
        run_pass(engine, "t")
    assert ("abandon", "s.1") in store.events and ("end", "s.1") not in store.events
    assert ("end", "t.3") in store.events
    store.close()


def test_what_cannot_begin_fails_where_its_segment_is_needed():
    store = Overlapping()
    store.unknown = {"s.1"}
    with Engine(planned(units=4, slots=4), store) as engine:
        with engine.visit("s", "s.0"):
            pass
        with pytest.raises(SegmentLoadError, match=r"there is no segment 's.1'"):
            engine.acquire("s", "s.1")
    store.close()


def test_stages_begin_by_their_own_stores_whole_where_those_cannot():
    files, own = Overlapping(), FakeStore()
    store = StagesStore(files, {"b": lambda inner: own})
    room = Extent(0, UNIT)
    first: Loading = store.begin(a_load("a", "a.0", room))
    assert files.events == [("begin", "a.0")]
    first.abandon()
    second = store.begin(a_load("b", "b.0", room))
    assert own.loads == []
    second.finish(lambda: None).release()
    assert own.loads == ["b.0"]
    store.close()
