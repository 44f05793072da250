"""Loads that begin while another ends: each whole in its own room, given up without a trace."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.reader import BLOCK, Reader, pread
from blockstream.checkpoint.read.requests import Request
from blockstream.engine.arena import Arena
from blockstream.errors import SegmentLoadError
from blockstream.plan.segments import Extent
from tests.support.checkpoint_files import arrays, bound, write
from tests.support.fakes import a_load

SHAPES = ((8 * BLOCK,), (100, 33), (7,))


@pytest.fixture(name="two")
def _two(tmp_path):
    """Return two segments of one file, the second's last tensor converted, and their tensors."""
    tensors = {**arrays(*SHAPES), **{f"u{i}": x for i, x in enumerate(arrays(*SHAPES, seed=1).values())}}
    checkpoint = Checkpoint.open(write(tmp_path / "a.safetensors", tensors, 8))
    layouts = {
        which: lay_out(
            which,
            [Request(n, (checkpoint[n],), dtype if n[1] == "2" else None) for n in tensors if n[0] == which],
        )
        for which, dtype in (("t", None), ("u", "F16"))
    }
    return layouts, tensors


def store_of(layouts, **options):
    """Return a store with room for both segments, and their rooms."""
    arena = Arena(sum(x.nbytes for x in layouts.values()))
    rooms = {"t": Extent(0, layouts["t"].nbytes), "u": Extent(layouts["t"].nbytes, layouts["u"].nbytes)}
    return FileStore(arena, {"m": layouts}, reader=Reader(request_nbytes=BLOCK, **options)), rooms


def expect(store, handle, tensors):
    got = bound(store, handle)
    assert got
    for name, array in got.items():
        assert array.tobytes() == tensors[name].astype(array.dtype).tobytes()


@pytest.mark.parametrize("order", ["tu", "ut"])
def test_loads_that_overlap_are_each_whole(two, order):
    layouts, tensors = two
    store, rooms = store_of(layouts)
    first, second = (store.begin(a_load("m", which, rooms[which])) for which in order)
    handles = [first.finish(), second.finish()]
    for handle in handles:
        expect(store, handle, tensors)
    assert store.totals.loads == 2
    store.close()


@pytest.mark.parametrize("which", ["t", "u"])
def test_nearly_is_called_before_a_load_is_done(two, which):
    layouts, tensors = two
    store, rooms = store_of(layouts, threads=1)
    other = {"t": "u", "u": "t"}[which]
    begun = []

    def nearly():
        if not begun:
            begun.append(store.begin(a_load("m", other, rooms[other])))

    handle = store.begin(a_load("m", which, rooms[which])).finish(nearly)
    expect(store, handle, tensors)
    expect(store, begun[0].finish(), tensors)
    store.close()


def test_reads_are_served_in_the_order_in_which_loads_began(two):
    layouts, _ = two
    offsets = []

    def noted(descriptor, view, offset):
        offsets.append(offset)
        return pread(descriptor, view, offset)

    store, rooms = store_of(layouts, threads=1, pread=noted)
    first, second = store.begin(a_load("m", "u", rooms["u"])), store.begin(a_load("m", "t", rooms["t"]))
    second.finish()
    first.finish()
    border = layouts["u"].reads[0].offset
    mine = [offset >= border for offset in offsets]
    of_first = -(-layouts["u"].reads[0].need // BLOCK)
    assert all(mine[:of_first]) and not any(mine[of_first : of_first + len(layouts["t"].reads)])
    store.close()


def abandon(loading):
    loading.abandon()


def fail_nearly(loading):
    with pytest.raises(ZeroDivisionError):
        loading.finish(lambda: 1 / 0)


@pytest.mark.parametrize("give_up", [abandon, fail_nearly])
def test_a_load_given_up_writes_nothing_afterwards(two, give_up):
    layouts, _ = two
    begun, let_go = threading.Event(), threading.Event()

    def gated(descriptor, view, offset):
        begun.set()
        assert let_go.wait(5)
        return pread(descriptor, view, offset)

    store, rooms = store_of(layouts, threads=20, pread=gated)  # all requests are its last ones
    loading = store.begin(a_load("m", "t", rooms["t"]))
    assert begun.wait(5)
    threading.Timer(0.05, let_go.set).start()
    give_up(loading)
    room = np.frombuffer(store.arena.view(rooms["t"]), np.uint8)
    room[:] = 0
    store.begin(a_load("m", "u", rooms["u"])).finish().release()
    assert not room.any()
    assert store.totals.loads == 1
    del room
    store.close()


def test_a_load_begun_on_a_closed_store_fails_as_others_do(two):
    layouts, _ = two
    store, rooms = store_of(layouts)
    store.close()
    with pytest.raises(SegmentLoadError, match="closed"):
        store.begin(a_load("m", "t", rooms["t"]))
