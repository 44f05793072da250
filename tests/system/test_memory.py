"""What a process holds, and the watch that keeps its peak."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading

import pytest

from blockstream.errors import EngineError
from blockstream.system import memory
from blockstream.system.memory import Held, HeldReader, MemoryWatch, PinnedBytes, held, split
from tests.support.cgroup import limited, why_not

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

STATUS = """Name:\tRssAnon: 5 kB
VmRSS:\t 999999 kB
RssAnon:\t    1000 kB
RssFile:\t     300 kB
RssShmem:\t      20 kB
VmSwap:\t       4 kB
Threads:\t1
"""


class Scripted:
    """Stands for the kernel: gives the next of the sizes at each read, the last one forever."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.reads = threading.Semaphore(0)

    def __call__(self) -> Held:
        size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
        self.reads.release()
        return Held(size, size)


def watch(*sizes: int, every_s: float = 3600, **kwargs) -> MemoryWatch:
    return MemoryWatch(read=Scripted(*sizes), every_s=every_s, **kwargs)


@linux
def test_held_is_anonymous_and_shared_and_swapped_and_pinned_and_not_file_pages(tmp_path):
    status, counter = tmp_path / "status", PinnedBytes()
    status.write_text(STATUS)
    counter.add(5)
    with HeldReader(status, counter) as reader:
        got = reader.read()
    assert got == Held(1024 * 1024 + 5, 1000 * 1024, 20 * 1024, 4 * 1024, 5, 300 * 1024)


@linux
def test_a_kernel_without_a_line_counts_nothing_for_it(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nRssAnon:\t 7 kB\n")
    with HeldReader(status) as reader:
        assert reader.read().anon == reader.read().nbytes == 7 * 1024


@linux
@pytest.mark.parametrize(
    ("flags", "kind"),
    [(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "anon"), (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, "shmem")],
)
def test_private_and_shared_memory_are_both_held_once_touched_and_not_before(flags, kind):
    before = held()
    with mmap.mmap(-1, 64 * MIB, flags=flags) as pages:
        assert held().nbytes - before.nbytes < 8 * MIB
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1
        after = held()
        assert after.nbytes - before.nbytes == pytest.approx(64 * MIB, abs=4 * MIB)
        assert getattr(after, kind) - getattr(before, kind) == pytest.approx(64 * MIB, abs=4 * MIB)
    assert held().nbytes - before.nbytes < 8 * MIB


@linux
def test_pages_of_a_mapped_file_are_told_apart_and_not_held(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(32 * MIB))
    before = held()
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[at] for at in range(0, len(pages), mmap.PAGESIZE)) == 0
        after = held()
    assert after.mapped - before.mapped > 24 * MIB
    assert after.nbytes - before.nbytes < 8 * MIB


@linux
def test_reading_again_and_again_opens_nothing_and_closing_twice_closes_once():
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    reader = HeldReader()
    during = descriptors()
    for _ in range(10):
        reader.read()
    assert descriptors() == during
    reader.close()
    reader.close()
    assert descriptors() == before


def test_more_pinned_bytes_are_never_given_back_than_were_registered():
    counter = PinnedBytes()
    counter.add(10)
    counter.add(-4)
    with pytest.raises(ValueError, match="7 pinned bytes given back, 6 registered"):
        counter.add(-7)
    assert counter.nbytes == 6


def test_pinned_bytes_count_in_what_the_process_holds():
    before = held().pinned
    memory.pinned.add(1000 * MIB)
    try:
        assert held().pinned == before + 1000 * MIB
        assert held().nbytes > 1000 * MIB
    finally:
        memory.pinned.add(-1000 * MIB)


def test_the_physical_footprint_is_the_eighth_number_after_the_uuid():
    class LibProc:
        @staticmethod
        def proc_pid_rusage(pid, flavor, info):
            assert (pid, flavor) == (os.getpid(), 0)
            fields = ctypes.cast(info, ctypes.POINTER(ctypes.c_uint64))
            for i in range(12):
                fields[i] = 100 + i
            return 0

    assert memory.footprint(LibProc()) == 100 + 2 + 7


def test_the_peak_keeps_its_moment_its_label_and_the_arena_at_that_time():
    arena, now = [0], [10.0]
    with watch(50, 80, 200, 120, arena_nbytes=lambda: arena[0], clock=lambda: now[0]) as w:
        w.sample("dit.block.03")
        arena[0], now[0] = 150, 12.5
        w.sample("dit.block.04")
        arena[0], now[0] = 10, 13.0
        w.sample("dit.block.05")
        assert (w.peak_nbytes, w.peak.label) == (200, "dit.block.03")
        assert (w.peak.at_s, w.peak.arena_nbytes) == (2.5, 150)


def test_a_label_holds_from_its_sample_on_until_the_next():
    with watch(1, 2, 3, 4, 3) as w:
        w.sample("a")
        assert w.peak.label == ""  # what was held at that sample came of what ran before
        w.sample()
        assert w.peak.label == "a"
        w.sample("b")
        assert w.peak.label == "a"


def test_a_peak_between_visits_is_seen_by_the_thread():
    read = Scripted(10, 20, 900, 30)
    with MemoryWatch(read=read, every_s=0.001) as w:
        for _ in range(5):
            assert read.reads.acquire(timeout=5)
    assert w.peak_nbytes == 900


def test_the_thread_is_gone_after_the_block_even_when_the_block_raises():
    with pytest.raises(KeyboardInterrupt), watch(1, every_s=0.001) as w:
        assert w.thread.is_alive()
        raise KeyboardInterrupt
    assert not w.thread.is_alive()


@linux
def test_a_watch_of_this_process_closes_what_it_opened():
    before = set(os.listdir("/proc/self/fd"))
    with MemoryWatch() as w:
        assert set(os.listdir("/proc/self/fd")) > before
        assert w.sample().nbytes > MIB
    assert set(os.listdir("/proc/self/fd")) == before
    w.close()


def test_closing_takes_a_last_sample():
    w = watch(10, 700)
    w.close()
    assert (w.peak_nbytes, w.samples) == (700, 2)


def test_a_budget_is_broken_by_one_sample_above_it_and_not_by_one_at_it():
    with watch(100, 100, 101, 50, budget_nbytes=100) as w:
        w.sample()
        assert not w.broken
        w.sample()
        assert w.broken
        w.sample()
        assert w.broken


def test_a_moved_budget_holds_from_the_next_sample_on():
    with watch(90, 90, budget_nbytes=100) as w:
        w.budget_nbytes = 80
        assert not w.broken
        w.sample()
        assert w.broken


def test_a_watch_whose_own_thread_fails_goes_on_and_says_so_once(caplog):
    failed, again = threading.Event(), threading.Event()

    def read() -> Held:
        if threading.current_thread().name == "memory-watch" and not again.is_set():
            (again if failed.is_set() else failed).set()
            raise OSError("no such process")
        return Held(1, 1)

    with MemoryWatch(read=read, every_s=0.001) as w:
        assert failed.wait(timeout=5) and again.wait(timeout=5)
        assert w.sample().nbytes == 1
        samples = w.samples
        while w.samples < samples + 3:
            assert w.thread.is_alive()
    assert isinstance(w.failure, OSError)
    assert caplog.text.count("no such process") == 1


def test_what_a_watch_calls_ends_neither_it_nor_a_run():
    called = threading.Event()

    def on_sample(now: Held) -> None:
        called.set()
        raise IndexError("list index out of range")

    with MemoryWatch(read=lambda: Held(7, 7), every_s=0.001, on_sample=on_sample) as w:
        assert called.wait(timeout=5)
        w.thread.join(timeout=0)
        assert w.sample().nbytes == 7
    assert isinstance(w.failure, IndexError)


def test_what_cannot_be_read_is_what_was_held_last():
    values = iter([Held(5, 5)])
    with MemoryWatch(read=lambda: next(values), every_s=60) as w:
        assert w.sample().nbytes == 5
        assert w.failure is not None
    with pytest.raises(StopIteration):
        MemoryWatch(read=lambda: next(values), every_s=60)


def test_a_closed_watch_samples_no_more():
    with watch(1) as w:
        pass
    with pytest.raises(EngineError, match="closed"):
        w.sample()


def test_a_watch_without_time_between_samples_is_refused():
    with pytest.raises(ValueError, match="every_s is 0"):
        watch(1, every_s=0)


def test_a_split_sums_to_the_peak_and_leaves_the_rest_to_other():
    with watch(100, 100, arena_nbytes=lambda: 40) as w:
        assert w.by_cause(runtime=30, activations=10) == {
            "arena": 40,
            "runtime": 30,
            "activations": 10,
            "other": 20,
        }


def test_causes_that_claim_more_than_was_held_get_what_is_left_in_their_order():
    parts = split(100, {"arena": 70, "runtime": 50, "activations": 5})
    assert parts == {"arena": 70, "runtime": 30, "activations": 0, "other": 0}
    assert split(5, {"arena": -3}) == {"arena": 0, "other": 5}


BURST = """
import sys, threading
from blockstream.system.memory import MemoryWatch
pause = threading.Event()
with MemoryWatch() as watch:
    watch.sample("burst")
    x = bytearray(b"x") * (int(sys.argv[1]) << 20)
    pause.wait(0.2)  # twenty samples long
    del x
    watch.sample("calm")
print(watch.peak_nbytes, watch.peak.label)
"""


@pytest.mark.skipif(bool(why_not("memory")), reason=why_not("memory") or "")
def test_the_peak_of_a_burst_between_visits_is_what_the_kernel_charged_for_it():
    with limited(memory_nbytes=400 * MIB) as group:
        done = group.run([sys.executable, "-c", BURST, "150"])
        charged = group.peak_nbytes
    assert done.returncode == 0, done.stderr
    peak, label = done.stdout.split()
    assert label == "burst"
    assert 150 * MIB < int(peak) <= charged  # the charge includes page cache and page tables
    assert charged - int(peak) < 60 * MIB
