"""What this process holds, and a watch that keeps its peak.

Held is private anonymous memory, shared memory, what of it was swapped out, and pinned host memory
the kernel does not count among these: the bytes a budget limits. Page cache and mapped files are
not held: the kernel can drop them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from blockstream.errors import EngineError

log = logging.getLogger(__name__)

#: Enough for the whole of /proc/self/status.
_STATUS_NBYTES = 8192


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds, in bytes; `nbytes` is the sum that a budget limits.

    `mapped` (resident pages of files) is not part of it. Where the system has no such split (macOS:
    physical footprint), all of it is `anon`. The kernel's counters may lag by some pages a thread.
    """

    nbytes: int
    anon: int
    shmem: int = 0
    swap: int = 0
    pinned: int = 0
    mapped: int = 0


class PinnedBytes:
    """Counts pinned host memory that the kernel does not show as held. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes registered now."""
        return self._nbytes

    def add(self, nbytes: int) -> None:
        """Register `nbytes` more; a negative number gives them back.

        Raises ValueError when more is given back than was registered.
        """
        with self._lock:
            if self._nbytes + nbytes < 0:
                raise ValueError(f"{-nbytes} pinned bytes given back, {self._nbytes} registered")
            self._nbytes += nbytes


#: The counter of this process, used where no other is named.
pinned = PinnedBytes()


def held() -> Held:
    """Return what this process holds now.

    Linux: RssAnon + RssShmem + VmSwap of /proc/self/status; macOS: the physical footprint;
    elsewhere psutil's private or resident bytes. Pinned host memory is added to each.
    """
    with HeldReader() as reader:
        return reader.read()


class HeldReader:
    """Reads what this process holds, again and again: one `pread` of a file that stays open.

    A fork's child has to open its own. Use as a context manager, or close it.
    """

    def __init__(self, status: Path = Path("/proc/self/status"), counter: PinnedBytes = pinned):
        self._counter = counter
        self._fd: int | None = None
        if sys.platform == "linux":
            try:
                self._fd = os.open(status, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise EngineError(
                    f"{status}: {error.strerror}; what this process holds is read there: mount /proc"
                ) from error

    def read(self) -> Held:
        """Return what is held now."""
        outside = self._counter.nbytes
        if self._fd is None:
            private = _private_nbytes()
            return Held(private + outside, private, pinned=outside)
        text = os.pread(self._fd, _STATUS_NBYTES, 0)
        anon, shmem = _kib(text, b"\nRssAnon:"), _kib(text, b"\nRssShmem:")
        swap, mapped = _kib(text, b"\nVmSwap:"), _kib(text, b"\nRssFile:")
        return Held(anon + shmem + swap + outside, anon, shmem, swap, outside, mapped)

    def close(self) -> None:
        """Close the file. More calls do nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def trim_heap() -> None:
    """Have the C library give free memory of its heap back; does nothing where it cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kib(status: bytes, key: bytes) -> int:
    """Return the bytes of one `Key:   123 kB` line, 0 where the kernel has no such line."""
    at = status.find(key)
    if at < 0:
        return 0
    start = at + len(key)
    return int(status[start : status.index(b"kB", start)]) * 1024


def _private_nbytes() -> int:
    """Return what the process holds on systems without /proc."""
    if sys.platform == "darwin":
        return footprint(ctypes.CDLL("/usr/lib/libproc.dylib"))
    info = psutil.Process().memory_info()
    return int(getattr(info, "private", info.rss))


def footprint(libproc: ctypes.CDLL) -> int:
    """Return the physical footprint from `proc_pid_rusage`: what macOS limits a process by."""
    # struct rusage_info_v0: a 16-byte uuid, then ten 64-bit numbers; the footprint is the eighth.
    info = (ctypes.c_uint64 * 12)()
    if libproc.proc_pid_rusage(os.getpid(), 0, ctypes.byref(info)) != 0:
        return int(psutil.Process().memory_info().rss)
    return int(info[9])


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that was held: what, when (seconds since the watch began), doing what.

    `arena_nbytes` are the bytes of the arena in use at that moment.
    """

    held: Held
    at_s: float
    label: str
    arena_nbytes: int


class Stretches:
    """Divides time so that a run of any length has few points: `SAME` stretches, then as many twice as long.

    The first are 20 ms; an hour has about four thousand.
    """

    SAME = 500
    FIRST_S = 0.020

    def __init__(self) -> None:
        self._count = 0
        self._length_s = self.FIRST_S
        self._ends_s = 0.0

    def is_over(self, now_s: float) -> bool:
        """Return whether a stretch ends now; the next one begins then."""
        if now_s < self._ends_s:
            return False
        self._count += 1
        if self._count % self.SAME == 0:
            self._length_s *= 2
        self._ends_s = now_s + self._length_s
        return True


class MemoryWatch:
    """Samples what the process holds, every 10 ms and at each visit, and keeps the peak.

    The kernel has no high-water mark for this sum, so a thread looks; it is joined by `close`, and
    by leaving the `with` block. `sample` may be called from any thread; `arena_nbytes` is called
    from any, under the watch's lock. A change of `budget_nbytes` holds from the next sample on;
    `broken` remembers that any sample was above it. Before it is, `judge(held, budget)`, called under the
    lock, says what the budget is at that very moment. `record(held, arena_nbytes)` is called under the
    lock, once a stretch of time with the most held in it, as rarely as `Stretches` says.
    """

    def __init__(
        self,
        budget_nbytes: int | None = None,
        every_s: float = 0.010,
        arena_nbytes: Callable[[], int] = lambda: 0,
        read: Callable[[], Held] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_sample: Callable[[Held], object] = lambda now: None,
        record: Callable[[Held, int], None] | None = None,
        judge: Callable[[Held, int], int] | None = None,
    ) -> None:
        if every_s <= 0:
            raise ValueError(f"every_s is {every_s}: a watch needs a time above 0 between samples")
        self.budget_nbytes = budget_nbytes
        self.broken = False
        self.samples = 0
        self.outside_nbytes = self._lap_nbytes = self._last_outside = 0
        self._judge = judge
        self._on_sample = on_sample
        self._every_s = every_s
        self._arena_nbytes = arena_nbytes
        self._clock = clock
        self._began = clock()
        self._record = record
        self._stretches = Stretches()
        self._most: tuple[Held, int] | None = None
        self._label = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        #: The first fault of the watch itself, or of what it calls: it samples on, and nobody can say more.
        self.failure: Exception | None = None
        self._last: Held | None = None
        self._reader = None if read else HeldReader()
        self._read = read or self._reader_read
        self._peak: Peak | None = None
        self.thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        try:
            self.sample()
            self.thread.start()
        except BaseException:
            self._close_reader()
            raise

    def sample(self, label: str | None = None) -> Held:
        """Return what is held now and account for it; `label` names what is done from here on.

        Without a label the last one stands. Raises EngineError after `close`. Where reading fails, what was
        held last stands, and `failure` is noted: the run goes on, and its budget is not called held.
        """
        if self._stop.is_set():
            raise EngineError("the memory watch is closed; nothing is sampled any more")
        try:
            return self._sample(label)
        except Exception as error:
            if self._last is None:
                raise
            self._note(error)
            return self._last

    def _note(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            log.warning("the memory watch failed and goes on: %s: %s", type(error).__name__, error)

    def _sample(self, label: str | None) -> Held:
        # One lock over read and compare: two threads never put an older, lower peak over a newer.
        with self._lock:
            now = self._last = self._read()
            self.samples += 1
            arena_nbytes = self._arena_nbytes()
            self._last_outside = outside = max(0, now.nbytes - arena_nbytes)
            self.outside_nbytes = max(self.outside_nbytes, outside)
            self._lap_nbytes = max(self._lap_nbytes, outside)
            if self._peak is None or now.nbytes > self._peak.held.nbytes:
                at = self._clock() - self._began
                self._peak = Peak(now, at, self._label, arena_nbytes)
            if self._record is not None:
                self._keep(now, arena_nbytes)
            if self.budget_nbytes is not None and now.nbytes > self.budget_nbytes and not self.broken:
                if self._judge is not None:
                    self.budget_nbytes = self._judge(now, self.budget_nbytes)
                self.broken = now.nbytes > self.budget_nbytes
            if label is not None:  # after the comparison: what is held now came of the last label
                self._label = label
            return now

    def _keep(self, now: Held, arena_nbytes: int) -> None:
        if self._most is None or now.nbytes > self._most[0].nbytes:
            self._most = (now, arena_nbytes)
        if self._stretches.is_over(self._clock() - self._began):
            self._write_most()

    def _write_most(self) -> None:
        if self._most is not None and self._record is not None:
            (most, arena_nbytes), self._most = self._most, None
            self._record(most, arena_nbytes)

    def lap(self) -> tuple[int, int]:
        """Return the most that was held outside the arena since the last call, and last; begin anew."""
        with self._lock:
            most, self._lap_nbytes = self._lap_nbytes, self._last_outside
            return most, self._last_outside

    def forget_outside(self, but_nbytes: int = 0) -> int:
        """Forget what was held outside the arena beyond what is now, which is returned, and `but_nbytes`."""
        with self._lock:
            now = self._last_outside = self._lap_nbytes = max(0, self._read().nbytes - self._arena_nbytes())
            self.outside_nbytes = min(self.outside_nbytes, now + but_nbytes)
            return now

    @property
    def peak(self) -> Peak:
        """Return the most that was held so far."""
        assert self._peak is not None  # the constructor samples
        return self._peak

    @property
    def peak_nbytes(self) -> int:
        """Return the bytes of the peak."""
        return self.peak.held.nbytes

    def by_cause(self, **nbytes: int) -> dict[str, int]:
        """Return the peak split by cause; the values sum to `peak_nbytes`.

        `nbytes` are the known causes in order, such as `runtime` and `activations`; the arena's
        bytes at the peak come first, and what nobody claims is "other".
        """
        return split(self.peak_nbytes, {"arena": self.peak.arena_nbytes, **nbytes})

    def close(self) -> None:
        """Stop the thread, join it and take a last sample. More calls do nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self.thread.join()
        try:
            self._sample(None)
            self._write_most()
        except Exception as error:
            self._note(error)
        finally:
            self._close_reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._on_sample(self._sample(None))
            except Exception as error:
                self._note(error)

    def _reader_read(self) -> Held:
        assert self._reader is not None
        return self._reader.read()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()


def split(total: int, causes: Mapping[str, int]) -> dict[str, int]:
    """Return `total` split over causes in their order, the rest as "other"; the parts sum to it.

    A cause gets no more than what those before it left: memory that was counted but never touched
    is not held.
    """
    parts, left = {}, total
    for cause, nbytes in causes.items():
        parts[cause] = min(max(0, nbytes), left)
        left -= parts[cause]
    return {**parts, "other": left}
