from __future__ import annotations

import errno
import os
import threading
import tracemalloc

import numpy as np
import pytest

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint import file_store as store_module
from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read import placement
from blockstream.checkpoint.read.convert import convert
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.reader import BLOCK, pread, probe_memory_align
from blockstream.checkpoint.read.requests import Request
from blockstream.engine.arena import Arena
from blockstream.errors import CheckpointError, SegmentLoadError
from blockstream.plan.segments import Extent
from tests.support.checkpoint_files import (
    arrays,
    bound,
    cached_pages,
    drop_cache,
    layout_of,
    load,
    store_of,
    write,
)

SHAPES = ((64, 64), (7,), (300, 33), (), (0, 2), (64,), (1000, 20))


def equal(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].tobytes() == array.tobytes()
        assert got[name].shape == array.shape


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.safetensors", arrays(*SHAPES), 8)


@pytest.mark.parametrize("request_nbytes", [BLOCK, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("data_mod_64", range(0, 64, 8))
def test_tensors_are_bound_as_they_are_in_the_file_and_64_byte_aligned(
    tmp_path, data_mod_64, direct, request_nbytes
):
    tensors = arrays(*SHAPES)
    path = write(tmp_path / "a.safetensors", tensors, data_mod_64)
    store, room = store_of(layout_of(path), direct=direct, request_nbytes=request_nbytes)
    handle = load(store, "m", "s", room)
    equal(bound(store, handle), tensors)
    for placed in handle.layout.tensors.values():
        assert not placed.nbytes or (store.arena.address + room.offset + placed.offset) % 64 == 0
    store.close()


def test_shards_are_read_into_one_room(tmp_path):
    first, second = arrays((50, 50), (3,)), arrays((40, 40), seed=1)
    one = Checkpoint.open(write(tmp_path / "1.safetensors", first, 16))
    two = Checkpoint.open(write(tmp_path / "2.safetensors", second, 48))
    wants = [Request(n, (one[n],)) for n in first] + [Request("u", (two["t0"],))]
    store, room = store_of(lay_out("s", wants))
    equal(bound(store, load(store, "m", "s", room)), {**first, "u": second["t0"]})
    store.close()


def test_dtypes_are_converted_and_tensors_stacked_on_the_way(tmp_path):
    tensors = arrays((30, 40), (30, 40), (30, 40))
    checkpoint = Checkpoint.open(write(tmp_path / "a.safetensors", tensors, 24))
    three = tuple(checkpoint[n] for n in ("t2", "t0", "t1"))
    layout = lay_out(
        "s",
        [
            Request("half", (checkpoint["t0"],), "F16"),
            Request("brain", (checkpoint["t1"],), "BF16"),
            Request("stack", three),
            Request("stack16", three, "F16"),
        ],
    )
    store, room = store_of(layout)
    handle = load(store, "m", "s", room)
    stacked = np.stack([tensors[n] for n in ("t2", "t0", "t1")])
    brain = bytearray(2400)
    convert(memoryview(tensors["t1"].tobytes()), "F32", memoryview(brain), "BF16")
    equal(
        bound(store, handle),
        {
            "half": tensors["t0"].astype(np.float16),
            "brain": np.frombuffer(brain, np.uint16).reshape(30, 40),
            "stack": stacked,
            "stack16": stacked.astype(np.float16),
        },
    )
    assert handle.counts.converted_nbytes == layout.converted_nbytes > 0
    store.close()


def test_counts_say_what_was_read_bound_and_moved(path):
    layout = layout_of(path)
    store, room = store_of(layout)
    for _ in range(3):
        counts = load(store, "m", "s", room).counts
    nbytes = sum(a.nbytes for a in arrays(*SHAPES).values())
    assert counts.bound_nbytes == nbytes
    assert nbytes <= counts.read_nbytes <= path.stat().st_size
    assert 0 < counts.moved_nbytes <= nbytes
    assert store.totals.loads == 3
    assert store.totals.read_nbytes == 3 * counts.read_nbytes
    assert store.reader.read_nbytes == store.totals.read_nbytes
    store.close()


def test_nothing_is_moved_where_the_device_takes_any_address(tmp_path):
    tensors = arrays((64, 64), (16,), (300, 32))
    path = write(tmp_path / "a.safetensors", tensors, 8)
    store, room = store_of(layout_of(path, memory_align=1), direct=False)
    equal(bound(store, load(store, "m", "s", room)), tensors)
    assert store.totals.moved_nbytes == 0
    store.close()


def test_a_layout_for_what_the_device_was_found_to_take_is_read_direct(path):
    align = probe_memory_align(path)
    if align == 1:
        pytest.skip("this file system is read buffered")
    store, room = store_of(layout_of(path, memory_align=align))
    equal(bound(store, load(store, "m", "s", room)), arrays(*SHAPES))
    assert store.reader.mode == "direct"
    store.close()


def test_loads_leave_nothing_in_the_page_cache(path):
    store, room = store_of(layout_of(path))
    drop_cache(path)
    load(store, "m", "s", room)
    if store.reader.mode == "direct":
        assert cached_pages(path) == 0
    store.close()


def test_loads_allocate_nothing_that_grows_with_the_segment(tmp_path):
    path = write(tmp_path / "a.safetensors", arrays((1 << 20,), (1 << 20,)), 8)
    store, room = store_of(layout_of(path))
    handle = load(store, "m", "s", room)
    touched = store.arena.touched_nbytes
    tracemalloc.start()
    for _ in range(5):
        handle.release()
        handle = load(store, "m", "s", room)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 10, f"{peak} bytes allocated in loads of {room.nbytes}"
    assert held < 32 << 10
    assert store.arena.touched_nbytes == touched
    store.close()


def test_releasing_a_segment_keeps_its_pages(path):
    store, room = store_of(layout_of(path))
    handle = load(store, "m", "s", room)
    touched = store.arena.touched_nbytes
    handle.release()
    assert store.arena.touched_nbytes == touched > 0
    store.close()


@pytest.mark.parametrize("wrong", ["small", "odd"])
def test_a_room_that_does_not_fit_is_refused(path, wrong):
    store, room = store_of(layout_of(path))
    rooms = {
        "small": Extent(room.offset, room.nbytes - 1),
        "odd": Extent(room.offset + 64, room.nbytes),
    }
    with pytest.raises(SegmentLoadError, match=r"'s' needs a room of \d+ bytes at a multiple"):
        load(store, "m", "s", rooms[wrong])
    store.close()


def test_a_segment_that_is_not_there_is_refused_by_name(path):
    store, room = store_of(layout_of(path))
    with pytest.raises(SegmentLoadError, match="no segment 'x'"):
        load(store, "m", "x", room)
    store.close()


def test_an_error_of_any_read_fails_the_load_and_the_next_load_is_whole(tmp_path):
    tensors = arrays((4096,), (4096,), (4096,), (5,))
    path = write(tmp_path / "a.safetensors", tensors, 8)
    checkpoint = Checkpoint.open(path)
    wants = [Request(n, (checkpoint[n],)) for n in ("t0", "t1", "t3")]
    layout = lay_out("s", [*wants, Request("half", (checkpoint["t2"],), "F16")])
    calls = count_calls(layout)
    assert calls > 8
    for at in range(calls):
        fault = Fault(at)
        store, room = store_of(layout, threads=2, request_nbytes=BLOCK, pread=fault)
        with pytest.raises(SegmentLoadError, match=r"'s': .*a\.safetensors: Input/output.*disk"):
            load(store, "m", "s", room)
        got = bound(store, load(store, "m", "s", room))
        assert got["t1"].tobytes() == tensors["t1"].tobytes()
        assert got["half"].tobytes() == tensors["t2"].astype(np.float16).tobytes()
        store.close()


def test_a_conversion_that_fails_leaves_no_read_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "STAGING_NBYTES", 2 * BLOCK)
    checkpoint = Checkpoint.open(write(tmp_path / "a.safetensors", arrays((9 * BLOCK,))))
    layout = lay_out("s", [Request("p", (checkpoint["t0"],), "F16")])
    begun, let_go, finished = threading.Event(), threading.Event(), threading.Event()

    def gated(descriptor, view, offset):
        if offset > 0:
            begun.set()
            assert let_go.wait(5)
            finished.set()
        return pread(descriptor, view, offset)

    def failing(*_):
        assert begun.wait(5)
        threading.Timer(0.05, let_go.set).start()
        raise RuntimeError("stop")

    monkeypatch.setattr(store_module, "convert", failing)
    store, room = store_of(layout, pread=gated)
    with pytest.raises(RuntimeError, match="stop"):
        load(store, "m", "s", room)
    assert finished.is_set()
    store.close()


class Fault:
    """A pread that fails once, at its nth call."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, descriptor, view, offset):
        self.calls += 1
        if self.calls == self.at + 1:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, view, offset)


def count_calls(layout) -> int:
    counter = Fault(-1)
    store, room = store_of(layout, request_nbytes=BLOCK, pread=counter)
    load(store, "m", "s", room)
    store.close()
    return counter.calls


def shorten(path):
    os.truncate(path, path.stat().st_size - 5000)


def rewrite(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    os.utime(path, ns=(1, 1))


def replace(path):
    other = path.with_name("new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorten, r"its size was \d+ bytes and is \d+"),
        (rewrite, "its modification time was"),
        (replace, "deleted or replaced"),
        (os.unlink, "deleted or replaced"),
    ],
)
def test_a_file_that_changes_while_in_use_fails_the_next_load(path, change, said):
    store, room = store_of(layout_of(path))
    load(store, "m", "s", room)
    change(path)
    with pytest.raises(SegmentLoadError, match=rf"a\.safetensors changed while.*{said}"):
        load(store, "m", "s", room)
    store.close()


@pytest.mark.parametrize(
    ("change", "said"), [(shorten, "its size"), (rewrite, "modification time"), (os.unlink, "No such")]
)
def test_a_file_that_changed_since_its_header_was_read_is_not_opened(path, change, said):
    layout = layout_of(path)
    change(path)
    with pytest.raises(CheckpointError, match=said):
        FileStore(Arena(layout.nbytes), {"m": {"s": layout}})


def test_a_header_rewritten_at_the_same_time_and_size_is_noticed(path):
    layout = layout_of(path)
    stat = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"t1"', b'"tx"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointError, match="its header is another"):
        FileStore(Arena(layout.nbytes), {"m": {"s": layout}})


def test_a_load_after_closing_fails_and_says_so(path):
    store, room = store_of(layout_of(path))
    store.close()
    with pytest.raises(SegmentLoadError, match="closed"):
        load(store, "m", "s", room)
