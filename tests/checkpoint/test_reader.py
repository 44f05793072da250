from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from blockstream.checkpoint.read import reader as module
from blockstream.checkpoint.read.reader import (
    BLOCK,
    Reader,
    Wanted,
    aligned_buffer,
    pread,
    probe_memory_align,
)
from blockstream.errors import CheckpointError, EngineError
from tests.support.checkpoint_files import cached_pages, drop_cache


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(20 * BLOCK + 100))
    return path


def read(reader: Reader, path: Path, offset: int, need: int) -> bytes:
    room = aligned_buffer(-(-need // BLOCK) * BLOCK)
    reader.read([Wanted(reader.open(path), offset, need, room)])
    return bytes(room[:need])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("request_blocks", [1, 3, 64])
def test_requests_of_any_size_and_number_bring_the_same_bytes(file, threads, request_blocks):
    content = file.read_bytes()
    with Reader(threads=threads, request_nbytes=request_blocks * BLOCK) as reader:
        assert read(reader, file, 0, len(content)) == content
        assert read(reader, file, 2 * BLOCK, 5000) == content[2 * BLOCK : 2 * BLOCK + 5000]
        assert reader.read_nbytes >= len(content) + 5000


def test_direct_reads_leave_nothing_in_the_page_cache(file):
    drop_cache(file)
    with Reader() as reader:
        read(reader, file, 0, 20 * BLOCK)
        if reader.mode != "direct":
            pytest.skip(f"this file system is read {reader.mode}")
    assert cached_pages(file) == 0


def test_buffered_reads_drop_what_they_cached(file):
    drop_cache(file)
    with Reader(direct=False) as reader:
        read(reader, file, 0, 20 * BLOCK)
        assert reader.mode == "buffered"
    assert cached_pages(file) <= 1  # the partial last page may stay


@pytest.mark.parametrize("limit", [BLOCK, 3 * BLOCK, 512, 1536, BLOCK + 512])
def test_short_reads_are_continued(file, limit):
    content = file.read_bytes()
    direct_here = probe_memory_align(file) > 1
    offsets = []

    def short(descriptor, view, offset):
        offsets.append(offset)
        return pread(descriptor, view[:limit], offset)

    with Reader(pread=short, request_nbytes=8 * BLOCK) as reader:
        assert read(reader, file, 0, len(content)) == content
        assert reader.calls > len(content) // limit
        if direct_here and limit >= BLOCK:  # a read that ends inside a block goes on from its start
            assert reader.mode == "direct"
            assert all(offset % BLOCK == 0 for offset in offsets)


def test_one_call_never_asks_for_more_than_the_system_reads(monkeypatch, file):
    monkeypatch.setattr(module, "MOST_NBYTES", 2 * BLOCK + 100)
    asked = []

    def watched(descriptor, view, offset):
        asked.append(len(view))
        return pread(descriptor, view, offset)

    with Reader(pread=watched, request_nbytes=1 << 40) as reader:
        read(reader, file, 0, 20 * BLOCK)
    assert max(asked) == 2 * BLOCK
    assert sum(asked) == 20 * BLOCK


def test_interrupted_calls_are_made_again(file):
    failures = iter([True, False] * 100)

    def interrupted(descriptor, view, offset):
        if next(failures):
            raise InterruptedError(errno.EINTR, "interrupted")
        return pread(descriptor, view, offset)

    with Reader(threads=1, pread=interrupted, request_nbytes=4 * BLOCK) as reader:
        assert read(reader, file, 0, 20 * BLOCK) == file.read_bytes()[: 20 * BLOCK]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads here")
def test_a_file_system_that_refuses_direct_reads_is_read_buffered(file):
    import fcntl

    def refusing(descriptor, view, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pread(descriptor, view, offset)

    with Reader(pread=refusing, request_nbytes=2 * BLOCK) as reader:
        content = file.read_bytes()
        assert read(reader, file, 0, len(content)) == content
        assert reader.mode == "buffered"


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads here")
def test_a_file_system_that_refuses_to_open_direct_is_read_buffered(monkeypatch, file):
    real = os.open

    def refusing(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    with Reader() as reader:
        assert read(reader, file, 0, BLOCK) == file.read_bytes()[:BLOCK]
        assert reader.mode == "buffered"


def test_an_address_the_device_refuses_is_read_buffered(file):
    room = aligned_buffer(4 * BLOCK)[1 : 1 + 2 * BLOCK]
    with Reader() as reader:
        reader.read([Wanted(reader.open(file), 0, 2 * BLOCK, room)])
    assert bytes(room) == file.read_bytes()[: 2 * BLOCK]


@pytest.mark.parametrize("at", range(5))
def test_an_error_of_any_call_names_the_file_and_the_place(file, at):
    calls = iter(range(1000))

    def failing(descriptor, view, offset):
        if next(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, view, offset)

    place = f"Input/output.* at {at * 4 * BLOCK}"
    with (
        Reader(threads=1, pread=failing, request_nbytes=4 * BLOCK) as reader,
        pytest.raises(OSError, match=place) as caught,
    ):
        read(reader, file, 0, 20 * BLOCK)
    assert caught.value.filename == str(file)
    assert caught.value.errno == errno.EIO


def test_no_request_writes_after_a_failure_was_raised(file):
    begun, let_go, finished = threading.Event(), threading.Event(), threading.Event()

    def gated(descriptor, view, offset):
        if offset == 0:
            assert begun.wait(5)
            raise OSError(errno.EIO, "Input/output error")
        begun.set()
        assert let_go.wait(5)
        finished.set()
        return pread(descriptor, view, offset)

    with Reader(threads=2, pread=gated, request_nbytes=BLOCK) as reader:
        room = aligned_buffer(2 * BLOCK)
        batch = reader.submit([Wanted(reader.open(file), 0, 2 * BLOCK, room)])
        timer = threading.Timer(0.05, let_go.set)
        timer.start()
        with pytest.raises(OSError, match="Input/output"):
            batch.wait()
        assert finished.is_set()
        timer.join()


def test_a_file_that_ends_early_is_refused(file):
    with Reader() as reader, pytest.raises(CheckpointError, match=r"ends at byte \d+, \d+ bytes early"):
        read(reader, file, 20 * BLOCK, 2 * BLOCK)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    with Reader() as reader:
        with pytest.raises(CheckpointError, match="No such file"):
            reader.open(tmp_path / "none")

        (tmp_path / "secret").touch()

        def denied(*args):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(CheckpointError, match=r"Permission denied.*permissions"):
            reader.open(tmp_path / "secret")


def test_a_closed_reader_reads_nothing(file):
    reader = Reader()
    opened = reader.open(file)
    reader.close()
    reader.close()
    with pytest.raises(EngineError, match="closed"):
        reader.read([Wanted(opened, 0, BLOCK, aligned_buffer(BLOCK))])
    with pytest.raises(EngineError, match="closed"):
        reader.open(file)


def test_closing_fails_the_requests_that_wait_and_joins_the_one_that_runs(file):
    started, let_go = threading.Event(), threading.Event()

    def gated(descriptor, view, offset):
        started.set()
        assert let_go.wait(5)
        return pread(descriptor, view, offset)

    reader = Reader(threads=1, pread=gated, request_nbytes=BLOCK)
    batch = reader.submit([Wanted(reader.open(file), 0, 8 * BLOCK, aligned_buffer(8 * BLOCK))])
    assert started.wait(5)
    closer = threading.Thread(target=reader.close)
    closer.start()
    let_go.set()
    with pytest.raises(EngineError, match="closed while it read"):
        batch.wait()
    closer.join(5)
    assert not closer.is_alive()


def test_the_address_alignment_a_device_asks_for_is_found_by_trying(file):
    align = probe_memory_align(file)
    assert align in (1, 4, 8, 16, 32, 64, 512, 4096)
    with Reader() as reader:
        room = aligned_buffer(4 * BLOCK)[align : align + BLOCK]
        reader.read([Wanted(reader.open(file), 0, BLOCK, room)])
        assert (reader.mode == "direct") == (align > 1)


@pytest.mark.parametrize("options", [{"threads": 0}, {"request_nbytes": 100}])
def test_no_threads_or_tiny_requests_are_refused(options):
    with pytest.raises(ValueError, match="threads"):
        Reader(**options)
