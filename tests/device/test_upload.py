"""What compute on a device reads is what the file holds, whenever copies end; and every wait is needed."""

from __future__ import annotations

import tempfile
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.checkpoint.file_store import FileStore
from blockstream.device.fake import FakeDevice
from blockstream.device.rooms import PinnedArena, Readers
from blockstream.device.upload import UploadHandle, UploadStore
from blockstream.errors import SegmentLoadError
from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import NONE, POLICIES, PREFIX, SPREAD
from blockstream.plan.segments import AtMost, Exactly, Schedule, Stage, Unknown
from blockstream.plan.tiers import device_schedule, host_schedule, make_tiers
from tests.support.examples import examples
from tests.support.towers import Weights, tower

KIND = st.sampled_from(["late", "early"])


def least(schedule):
    """Return the least rooms of (device, host)."""
    above = device_schedule(schedule, frozenset())
    nothing = make_plan(above, least_arena(above), [NONE])
    return least_arena(above), least_arena(host_schedule(schedule, nothing))


def tiers_of(schedule, more=(0, 0), policies=(SPREAD,)):
    rooms = tuple(a + b for a, b in zip(least(schedule), more, strict=True))
    return make_tiers(schedule, rooms, policies)


@pytest.fixture(name="four")
def _four(tmp_path):
    """Return weights of one stage of four segments and its schedule of three passes."""
    weights = Weights(tmp_path, {"s": [3000, 5000, 4000, 2000]})
    return weights, Schedule((Stage("s", weights.segments("s"), passes=Exactly(3)),))


def run(built, schedule):
    for visit in schedule.visits():
        stage = schedule.stages[visit.stage]
        built.visit(stage.name, stage.segment(visit.position).name)


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("more", [(0, 0), (0, 1 << 20), (1 << 20, 0), (24 << 10, 24 << 10)])
def test_compute_reads_what_the_file_holds(four, copies, more):
    weights, schedule = four
    device = FakeDevice(copies=copies, queued=True)
    with tower(weights, tiers_of(schedule, more), device) as built:
        run(built, schedule)
        assert built.right()
        assert built.host.unplanned == 0
    assert len(built.read) == 12


def test_what_fits_in_host_memory_is_read_from_disk_once_and_copied_every_pass(four):
    weights, schedule = four
    device = FakeDevice(queued=True)
    tiers = tiers_of(schedule, (0, 1 << 20))
    assert not tiers.device.stages[0].retained and len(tiers.host.stages[0].retained) == 4
    with tower(weights, tiers, device) as built:
        run(built, schedule)
        assert built.files.totals.loads == 4
        assert built.store.copied_nbytes >= 3 * sum(x.nbytes for x in weights.tensors.values())
        assert built.right()


def test_what_fits_on_the_device_is_read_and_copied_once_through_two_slots_of_host_memory(four):
    weights, schedule = four
    device = FakeDevice(queued=True)
    tiers = tiers_of(schedule, (1 << 20, 0))
    assert len(tiers.device.stages[0].retained) == 4 and not tiers.host.stages[0].retained
    assert tiers.host.arena_nbytes < sum(s.nbytes for s in schedule.stages[0].segments)
    with tower(weights, tiers, device) as built:
        run(built, schedule)
        assert built.files.totals.loads == 4
        assert built.right()
    assert device.copied_nbytes == built.store.copied_nbytes


def test_a_stage_kept_on_the_device_lets_host_memory_read_the_next_one_ahead(tmp_path):
    weights = Weights(tmp_path, {"a": [3000] * 3, "b": [3000] * 3})
    stages = [Stage(n, weights.segments(n), passes=Exactly(2)) for n in ("a", "b")]
    schedule = Schedule(tuple(stages))
    tiers = tiers_of(schedule, (1 << 20, 0))
    with tower(weights, tiers, FakeDevice(queued=True)) as built:
        for i in range(3):
            built.visit("a", f"{i}")
        assert built.host.cursor == (1, 0, 0)
        for name in ("0", "1", "2"):
            built.visit("a", name)
        run_b = Schedule((stages[1],))
        run(built, run_b)
        assert built.right()


def test_what_is_not_in_the_plan_is_detoured_on_both_tiers(four):
    weights, schedule = four
    with tower(weights, tiers_of(schedule), FakeDevice(queued=True)) as built:
        for name in ("0", "2", "1", "1", "3", "0"):
            built.visit("s", name)
        assert built.right()


def test_a_read_that_fails_reaches_compute_by_name(four):
    weights, schedule = four

    def broken(descriptor, view, offset):
        raise OSError(5, "Input/output error")

    gone = pytest.raises(SegmentLoadError, match="segment '0'")
    with tower(weights, tiers_of(schedule), FakeDevice(queued=True), pread=broken) as built, gone:
        built.visit("s", "0")


def test_memory_that_cannot_be_registered_is_copied_from_all_the_same_and_said(four):
    weights, schedule = four
    device = FakeDevice(queued=True, refuses="out of pinned memory")
    with tower(weights, tiers_of(schedule), device) as built:
        run(built, schedule)
        assert built.right()
        assert built.pinned.refused == "out of pinned memory"
        assert built.pinned.registered_nbytes == 0


sizes = st.lists(st.integers(100, 6000), min_size=1, max_size=5)
passes = st.one_of(
    st.integers(1, 3).map(Exactly), st.integers(1, 3).map(AtMost), st.integers(1, 3).map(Unknown)
)
more = st.sampled_from([0, 8 << 10, 32 << 10, 1 << 20])


@given(
    st.dictionaries(st.sampled_from("ab"), sizes, min_size=1),
    st.lists(passes, min_size=2, max_size=2),
    st.tuples(more, more),
    st.sampled_from([[NONE], [PREFIX], [SPREAD], list(POLICIES)]),
    KIND,
    st.randoms(use_true_random=False),
)
@examples(40)
def test_any_schedule_in_any_rooms_reads_right(shapes, passes, more, policies, copies, random):
    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(Path(folder), shapes)
        stages = [Stage(n, weights.segments(n), passes=p) for n, p in zip(shapes, passes, strict=False)]
        schedule = Schedule(tuple(stages))
        tiers = tiers_of(schedule, more, policies)
        device = FakeDevice(copies=copies, queued=True)
        with tower(weights, tiers, device) as built:
            for visit in schedule.visits():
                stage = schedule.stages[visit.stage]
                if random.random() < 0.1:  # skipped, or out of the order
                    continue
                built.visit(stage.name, stage.segment(visit.position).name)
                if random.random() < 0.2:
                    device.synchronise()
            assert built.right()


# -- every wait is needed ----------------------------------------------------------------------


def forget_ready(patch):
    """Let compute begin before what it reads is there."""
    patch.setattr(UploadHandle, "read", lambda self: setattr(self, "is_read", True))


def forget_readers(patch):
    """Let a copy begin before those who read what lies there are done."""
    patch.setattr(Readers, "readers", lambda self, extent: [])


def forget_consumed(patch):
    """Give an extent up without a fence."""
    patch.setattr(UploadHandle, "release", lambda self: None)


class Over:
    """A fence that says it is over, and lets compute wait for the real one."""

    def __init__(self, fence):
        self.fence = fence

    def is_over(self):
        return True

    def wait(self):
        pass


def forget_the_copy(patch):
    """Give host memory back to the disk before the copy out of it has ended."""
    copy = UploadStore.queue

    def read(handle):
        handle._store.device.compute_waits(handle.ready.fence)
        handle.is_read = True

    patch.setattr(UploadStore, "queue", lambda self, load, handle: Over(copy(self, load, handle)))
    patch.setattr(UploadHandle, "read", read)


@pytest.mark.parametrize("forget", [forget_ready, forget_readers, forget_consumed, forget_the_copy])
def test_without_any_one_of_the_waits_compute_reads_something_else(four, monkeypatch, forget):
    weights, schedule = four
    wrong = []
    with monkeypatch.context() as patch:
        forget(patch)
        for copies, more in product(("late", "early"), ((0, 0), (0, 1 << 20))):
            with tower(weights, tiers_of(schedule, more), FakeDevice(copies=copies, queued=True)) as built:
                run(built, schedule)
                wrong.append(not built.right())
    assert any(wrong)


# -- registered beside reading -----------------------------------------------------------------


class Slow(FakeDevice):
    """Registers memory once a segment is being read into it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reading, self.asked = threading.Event(), threading.Event()
        begin = FileStore.begin

        def begun(store, load):
            self.reading.set()
            return begin(store, load)

        monkeypatch.setattr(FileStore, "begin", begun)

    def register(self, address, nbytes):
        assert self.reading.wait(10), "nothing is read before all is registered"
        return super().register(address, nbytes)


def streamed_on(device, tmp_path):
    """Return whether a small model that streams on a device gives the bits it should."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).requires_grad_(False)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    x = torch.randn(3, 64)
    made = lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))  # noqa: E731
    with torch.no_grad():
        wanted = module(x)
        with blockstream.stream(made, tmp_path / "m.safetensors", device=device, budget="8GiB") as m:
            return torch.equal(m(x), wanted)


def test_host_memory_is_registered_while_it_is_read_into_and_copies_wait_for_it(tmp_path, monkeypatch):
    device = Slow(monkeypatch)
    assert streamed_on(device, tmp_path)
    assert device.copied_nbytes and not device.pageable_nbytes and not device.registered


def test_without_the_wait_for_registration_copies_are_pageable(tmp_path, monkeypatch):
    device = Slow(monkeypatch)
    register, copied = device.register, threading.Event()
    monkeypatch.setattr(device, "register", lambda *args: copied.wait(10) and register(*args))
    settle = PinnedArena.settle
    monkeypatch.setattr(PinnedArena, "settle", lambda self: None)
    copy = device.copy

    def first(pairs):
        try:
            return copy(pairs)
        finally:
            copied.set()

    monkeypatch.setattr(device, "copy", first)
    unregister = PinnedArena.unregister

    def settled(self):
        settle(self)
        unregister(self)

    monkeypatch.setattr(PinnedArena, "unregister", settled)
    streamed_on(device, tmp_path)
    assert device.pageable_nbytes
