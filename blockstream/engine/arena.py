"""The memory all weights live in: one private anonymous mapping, carved into extents by the plan.

Private and anonymous so that its pages count as RssAnon, which the budget is judged by (Python's
default `mmap.mmap(-1, n)` is shared). Nothing is committed until it is touched; `discard` gives
pages back.

Lifetime: an arena has no `close`. Views handed out by `view`, and numpy or torch arrays built on
them with `frombuffer`, keep the mapping alive by reference, and it goes when the last of them does.
Unmapping it earlier would turn a forgotten tensor into a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from blockstream.errors import BudgetError
from blockstream.plan.segments import Extent

PAGE = mmap.PAGESIZE
#: Linux backs an aligned range of this size with one page where it can: fewer faults, fewer misses.
HUGE_PAGE = 2 << 20
#: Address space beyond what is ever touched costs nothing, and is not to be counted as promised.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)  # MAP_NORESERVE
#: A thread commits so much at a time.
COMMIT_NBYTES = 32 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it


class Arena:
    """One private anonymous mapping of `nbytes`, addressed by extents.

    Threads may use different extents at once; the plan keeps those of live segments apart.
    The mapping is not inherited by forked children, which must not touch it.
    """

    def __init__(self, nbytes: int, *, huge_pages: bool = True) -> None:
        if nbytes <= 0:
            raise ValueError(f"an arena needs a positive size, not {nbytes} bytes")
        self.nbytes = -(-nbytes // PAGE) * PAGE
        try:
            self._map = mmap.mmap(-1, self.nbytes + HUGE_PAGE, flags=_FLAGS)
        except (OSError, OverflowError) as error:
            raise BudgetError(
                f"the system refused an arena of {nbytes} bytes ({error}); ask for a smaller arena or budget"
            ) from error
        whole = memoryview(self._map)
        start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        skip = -start % HUGE_PAGE
        #: Address of byte 0; a multiple of the huge page, so an extent's offset decides alignment.
        self.address = start + skip
        self._skip = skip
        self._view = whole[skip : skip + self.nbytes]
        if huge_pages:
            self._advise("MADV_HUGEPAGE")
        self._advise("MADV_DONTFORK")
        self._lock = threading.Lock()
        self._touched = bytearray(self.nbytes // PAGE)  # 1 for each page that may be committed
        self._touched_nbytes = 0
        #: Most bytes that were ever touched at once, and bytes given back in all.
        self.peak_touched_nbytes = 0
        self.discarded_nbytes = 0

    @classmethod
    def reserve(cls, most_nbytes: int, least_nbytes: int) -> Arena:
        """Return an arena of `most_nbytes`, or of `least_nbytes` where address space is limited."""
        try:
            return cls(max(most_nbytes, least_nbytes, 1))
        except BudgetError:
            return cls(max(least_nbytes, 1))

    def __repr__(self) -> str:
        return f"Arena(nbytes={self.nbytes}, touched={self._touched_nbytes})"

    @property
    def touched_nbytes(self) -> int:
        """Return the bytes of pages viewed and not discarded since: the most that is committed."""
        return self._touched_nbytes

    def view(self, extent: Extent) -> memoryview:
        """Return a writable view of an extent; its pages count as touched from now on.

        Raises ValueError if the extent leaves the arena.
        """
        self._check(extent)
        with self._lock:
            self._mark(extent, 1)
        return self._view[extent.offset : extent.end]

    def populate(self, extent: Extent) -> None:
        """Commit the pages of an extent now, so that nothing that uses them later faults."""
        if extent.nbytes == 0:
            return
        view = self.view(extent)
        first, end = extent.offset // PAGE * PAGE, -(-extent.end // PAGE) * PAGE
        # Not by way of the mapping: its madvise keeps other threads from running meanwhile.
        if sys.platform != "linux" or ctypes.CDLL(None).madvise(
            ctypes.c_void_p(self.address + first), ctypes.c_size_t(end - first), _MADV_POPULATE_WRITE
        ):  # older kernels, other systems: touch each page
            for i in range(0, extent.nbytes, PAGE):
                view[i] = view[i]
            view[-1] = view[-1]

    def commit(
        self, extents: Iterable[Extent], threads: int = 1, may: Callable[[], bool] = lambda: True
    ) -> bool:
        """Commit what of some extents is not, by several threads: a system may take a second a GB.

        `may` is asked before each step of a piece a thread; once it says no, nothing more is committed
        and False returned.
        """
        pieces = [
            Extent(at, min(COMMIT_NBYTES, x.end - at))
            for x in sorted(extents)
            for at in range(x.offset, x.end, COMMIT_NBYTES)
        ]
        left = [x for x in pieces if self._touched.find(0, x.offset // PAGE, -(-x.end // PAGE)) >= 0]
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="blockstream-commit") as pool:
            for at in range(0, len(left), max(threads, 1)):
                if not may():
                    return False
                list(pool.map(self.populate, left[at : at + max(threads, 1)]))
        return True

    def discard(self, extent: Extent) -> int:
        """Give the whole pages inside an extent back to the system; return their bytes.

        What they held is lost: a later view of them starts as zeros (on Linux). The caller knows
        that nothing uses the extent any more.
        """
        self._check(extent)
        first, end = -(-extent.offset // PAGE) * PAGE, extent.end // PAGE * PAGE
        if end <= first:
            return 0
        # Linux drops private pages at once; elsewhere DONTNEED keeps them, FREE lets them go.
        advice = mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE
        self._map.madvise(advice, self._skip + first, end - first)
        with self._lock:
            self._mark(Extent(first, end - first), 0)
            self.discarded_nbytes += end - first
        return end - first

    def keep(self, extents: Iterable[Extent]) -> int:
        """Give everything outside these extents back to the system; return its bytes."""
        given, offset = 0, 0
        for x in [*sorted(x for x in extents if x.nbytes), Extent(self.nbytes, 0)]:
            if x.offset > offset and self._touched.find(1, offset // PAGE, -(-x.offset // PAGE)) >= 0:
                given += self.discard(Extent(offset, x.offset - offset))
            offset = max(offset, x.end)
        return given

    def _check(self, extent: Extent) -> None:
        if extent.offset < 0 or extent.nbytes < 0 or extent.end > self.nbytes:
            raise ValueError(f"{extent} leaves the arena of {self.nbytes} bytes")

    def _mark(self, extent: Extent, value: int) -> None:
        """Set the flag of an extent's pages and keep the counters; the lock is held."""
        if extent.nbytes == 0:
            return
        first, end = extent.offset // PAGE, -(-extent.end // PAGE)
        changed = self._touched.count(1 - value, first, end)
        if changed:
            self._touched[first:end] = bytes([value]) * (end - first)
            self._touched_nbytes += PAGE * (changed if value else -changed)
            self.peak_touched_nbytes = max(self.peak_touched_nbytes, self._touched_nbytes)

    def _advise(self, name: str) -> None:
        """Give the kernel a hint by name; one it does not know changes nothing we rely on."""
        advice = getattr(mmap, name, None)
        if advice is not None:
            try:
                self._map.madvise(advice)
            except OSError:
                return
