"""Read extents of files straight into memory, past the page cache, several requests at a time.

On Linux files are opened with O_DIRECT: the device writes into the room, nothing is cached and
nothing copied. macOS has F_NOCACHE. Where the file system refuses (tmpfs, some networks) reads are
buffered and the pages dropped after each request; `Reader.mode` says which it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from blockstream.errors import CheckpointError, EngineError
from blockstream.system import regular

from .entries import FileStamp, unreadable
from .sourced import SourceFile

BLOCK = 4096
#: One call reads at most this much (Linux: 2 GiB - 4 KiB), whatever is asked.
MOST_NBYTES = 0x7FFFF000
REQUEST_NBYTES = 16 << 20
#: More than a disk needs: while one request waits for its pages to be cleared, others read.
THREADS = 4
#: Files open at once, where the system allows as many.
MOST_OPEN = 256
_F_NOCACHE = 48  # macOS; Python has no name for it

Mode = Literal["direct", "nocache", "buffered", "remote"]
#: pread(descriptor, view, offset) -> bytes read; the seam where tests inject faults.
Pread = Callable[[int, memoryview, int], int]


def pread(descriptor: int, view: memoryview, offset: int) -> int:
    """Read from a file into a view with one system call; return the bytes read, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    data = os.pread(descriptor, len(view), offset)
    view[: len(data)] = data
    return len(data)


def most_open() -> int:
    """Return how many files a reader keeps open at once: a part of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, (soft - 16) // 3))


def aligned_buffer(nbytes: int) -> memoryview:
    """Return private zeroed memory at a page's start, fit for direct reads and writes."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Wanted(NamedTuple):
    """Bytes to read: into `view` from `offset`; the file may end after `need` of them."""

    file: ReadFile | SourceFile
    offset: int
    need: int
    view: memoryview


class ReadFile:
    """One file and how it is read. Made open by `Reader.open`, which may close it while it is idle."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        self.mode: Mode = "buffered"
        self._direct = direct
        self._lock = threading.Lock()
        self._users = 0
        self._open: int | None = None
        self._identity: tuple[int, int] | None = None
        self._reopen()

    @property
    def descriptor(self) -> int:
        """Return the descriptor of a file that nobody parks."""
        assert self._open is not None, "the file is parked or closed"
        return self._open

    @contextlib.contextmanager
    def use(self) -> Generator[int, None, None]:
        """Yield the descriptor, opened again if the file was parked; it stays open within."""
        with self._lock:
            if self._open is None:
                self._reopen()
            self._users += 1
        try:
            yield self.descriptor
        finally:
            with self._lock:
                self._users -= 1

    def stat(self) -> os.stat_result:
        """Return what the system says of the file that was opened; of a parked one, of its path."""
        with self._lock:
            return os.stat(self.path) if self._open is None else os.fstat(self._open)

    def changes(self, stamp: FileStamp) -> list[str]:
        """Return in words what differs from the file that was stamped."""
        return stamp.changes(self.stat())

    def park(self) -> bool:
        """Close the file until it is used again; False while it is used."""
        with self._lock:
            if self._users:
                return False
            self.close()
            return True

    def close(self) -> None:
        """Close the file. Idempotent."""
        descriptor, self._open = self._open, None
        if descriptor is not None:
            os.close(descriptor)

    def _reopen(self) -> None:
        path = self.path
        flag = getattr(os, "O_DIRECT", 0) if self._direct else 0
        try:
            try:
                self._open = regular.descriptor(path, flag)
                self.mode = "direct" if flag else "buffered"
            except OSError as error:
                if not flag or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                self._open = regular.descriptor(path)
        except OSError as error:
            raise unreadable(path, error) from error
        found = os.fstat(self._open)
        identity, self._identity = self._identity, (found.st_dev, found.st_ino)
        if identity not in (None, self._identity):
            self.close()
            raise CheckpointError(
                f"{path}: has changed since it was opened: it was replaced; open the checkpoint again"
            )
        if self._direct and not flag and hasattr(fcntl, "F_NOCACHE"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._open, _F_NOCACHE, 1)
                self.mode = "nocache"

    def fall_back(self) -> None:
        """Go on buffered: the file system took the flag but not the reads."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self.mode = "buffered"

    def drop_cached(self, offset: int, nbytes: int) -> None:
        """Drop the pages a buffered read left in the cache."""
        if hasattr(os, "posix_fadvise"):
            start, end = offset // BLOCK * BLOCK, -(-(offset + nbytes) // BLOCK) * BLOCK
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


class Batch:
    """Reads in flight, in requests that are served in order."""

    def __init__(self) -> None:
        self._requests: list[tuple[Future[None], int, int]] = []

    def add(self, request: Future[None], wanted: int, arrived: int) -> None:
        """Note a request: once it is served, `arrived` bytes of that wanted are there."""
        self._requests.append((request, wanted, arrived))

    def __len__(self) -> int:
        """Return how many requests there are."""
        return len(self._requests)

    def wait(self) -> None:
        """Return when all is read; raise the first failure once no request writes any more."""
        for _ in self.arrivals():
            pass

    def arrivals(self) -> Generator[tuple[int, int], None, None]:
        """Yield (which wanted, bytes of it there so far), in order, as they arrive.

        Raises as `wait` does. However it is left, nothing writes any more.
        """
        try:
            for request, wanted, arrived in self._requests:
                request.result()
                yield wanted, arrived
        except CancelledError:
            raise EngineError("the reader was closed while it read") from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drop the requests not yet begun and wait for the others, interrupted or not."""
        interrupt: BaseException | None = None
        for request, _, _ in self._requests:
            request.cancel()
        for request, _, _ in self._requests:
            while not request.done():
                try:
                    request.exception()
                except BaseException as error:
                    interrupt = error
        if interrupt is not None:
            raise interrupt


class Reader:
    """Reads with `threads` requests of `request_nbytes` in flight, at most.

    `pread` replaces the system call in tests. Closing it joins the threads and closes the files.
    """

    def __init__(
        self,
        *,
        threads: int = THREADS,
        request_nbytes: int = REQUEST_NBYTES,
        direct: bool = True,
        pread: Pread = pread,
    ) -> None:
        if threads < 1 or request_nbytes < BLOCK:
            raise ValueError(f"{threads} threads, requests of {request_nbytes} bytes")
        self.request_nbytes = min(request_nbytes, MOST_NBYTES) // BLOCK * BLOCK
        self.threads = threads
        self.direct = direct
        self._pread = pread
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="blockstream-reader")
        self._lock = threading.Lock()
        self._files: list[ReadFile] = []
        #: Those that are open, the ones used last at the end.
        self._open: OrderedDict[ReadFile, None] = OrderedDict()
        self._most_open = most_open()
        self._closed = False
        self._elsewhere: set[Mode] = set()
        #: Bytes that arrived, and calls made, since the reader was made.
        self.read_nbytes = 0
        self.calls = 0

    def open(self, path: str | os.PathLike[str]) -> ReadFile:
        """Return a file to read from, open until the reader closes."""
        with self._lock:
            if self._closed:
                raise EngineError("the reader is closed; open the checkpoint again")
            self._make_room()
            file = ReadFile(Path(path), self.direct)
            self._files.append(file)
            self._open[file] = None
            return file

    def open_stamped(self, stamp: FileStamp) -> ReadFile | SourceFile:
        """Return the file of a stamp to read from, wherever it lies."""
        if stamp.source is None:
            return self.open(stamp.path)
        self._elsewhere.add("remote")
        return SourceFile(stamp)

    @contextlib.contextmanager
    def _using(self, file: ReadFile) -> Generator[int, None, None]:
        with self._lock:
            if file not in self._open:
                self._make_room()
            self._open[file] = None
            self._open.move_to_end(file)
            opened = file.use()
            descriptor = opened.__enter__()
        try:
            yield descriptor
        finally:
            opened.__exit__(None, None, None)

    def _make_room(self) -> None:
        """Park files used longest ago, so that few are open at once. Under the lock."""
        for file in list(self._open):
            if len(self._open) < self._most_open:
                return
            if file.park():
                del self._open[file]

    @property
    def mode(self) -> Mode:
        """Return how files are read: "remote" if any lies elsewhere, "buffered" if any is read so."""
        modes = {f.mode for f in self._files} | self._elsewhere
        ranked: tuple[Mode, ...] = ("remote", "buffered", "nocache", "direct")
        return next((m for m in ranked if m in modes), "direct")

    def submit(self, wanted: Iterable[Wanted]) -> Batch:
        """Start reading and return what to wait for; `EngineError` once closed.

        Direct reads need offset, length and address at multiples of the block (the address: of
        what the device asks); others are refused by the system and then read buffered.
        """
        batch = Batch()
        try:
            for i, w in enumerate(wanted):
                for at in range(0, w.need, self.request_nbytes):
                    view = w.view[at : at + self.request_nbytes]
                    need = min(self.request_nbytes, w.need - at)
                    request = self._pool.submit(self._fill, w.file, w.offset + at, view, need)
                    batch.add(request, i, at + need)
        except RuntimeError as error:
            with contextlib.suppress(EngineError):
                batch.wait()
            raise EngineError("the reader is closed; open the checkpoint again") from error
        return batch

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Read and wait. Raises OSError naming the file, or CheckpointError where one ends early."""
        self.submit(wanted).wait()

    def close(self) -> None:
        """Drop requests not yet begun, join the threads, close the files. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._closed = True
            files, self._files = self._files, []
            self._open.clear()
        for file in files:
            file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self, file: ReadFile | SourceFile, offset: int, view: memoryview, need: int) -> None:
        """Read one request, however many calls it takes."""
        if isinstance(file, SourceFile):
            file.read(offset, view[:need])
            self._count(need, 1)
            return
        with self._using(file) as descriptor:
            self._fill_from(descriptor, file, offset, view, need)

    def _fill_from(self, descriptor: int, file: ReadFile, offset: int, view: memoryview, need: int) -> None:
        done = calls = 0
        while done < need:
            direct = file.mode == "direct"  # asked once: another thread may fall back meanwhile
            want = view[done:] if direct else view[done:need]
            calls += 1
            try:
                n = self._pread(descriptor, want, offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    file.fall_back()
                    continue
                what = f"{error.strerror} while reading {len(want)} bytes at {offset + done}"
                raise OSError(error.errno, what, str(file.path)) from error
            if n == 0:
                raise CheckpointError(
                    f"{file.path}: ends at byte {offset + done}, {need - done} bytes early; "
                    "the file was cut short: fetch it again"
                )
            done += n
            if done < need and done % BLOCK and direct:
                # A short direct read may stop inside a block: go on from its start.
                if n > done % BLOCK:
                    done -= done % BLOCK
                else:
                    file.fall_back()
        if file.mode == "buffered":
            file.drop_cached(offset, need)
        self._count(done, calls)

    def _count(self, nbytes: int, calls: int) -> None:
        with self._lock:
            self.read_nbytes += nbytes
            self.calls += calls


def probe_memory_align(path: str | os.PathLike[str]) -> int:
    """Return what the addresses of direct reads of a file must be multiples of, by trying.

    1 where reads are buffered. NVMe devices mostly take 4, others 512; up to `BLOCK` is tried.
    """
    file = ReadFile(Path(path), direct=True)
    try:
        if file.mode != "direct":
            return 1
        room = aligned_buffer(3 * BLOCK)
        for align in (4, 8, 16, 32, 64, 512):
            try:
                pread(file.descriptor, room[align : align + BLOCK], 0)
            except OSError:
                continue
            return align
        return BLOCK
    finally:
        os.close(file.descriptor)
