"""How fast this disk reads when nothing is cached, directly and through the page cache.

The figures decide how a checkpoint is read, and they are what a run's own read speed is held against.
Every read is of bytes whose cached pages were dropped before; what a virtual machine's host or the
drive itself caches cannot be dropped, so an existing large file tells more than a fresh one.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from blockstream.budget.amounts import format_nbytes
from blockstream.errors import ConfigError
from blockstream.system import regular

from .mounts import FileSystem, file_system

ALIGNMENT = 4096
#: (bytes a request, requests in flight) to try; the first is how the reader reads unless told otherwise.
WAYS = ((16 << 20, 4), (16 << 20, 2), (16 << 20, 1), (4 << 20, 4), (4 << 20, 1), (1 << 20, 8), (1 << 20, 1))
#: Within so many seconds a disk ends what was read ahead of a read that has ended.
READAHEAD_S = 0.02

_FIRST_BIT = bytes(state & 1 for state in range(256))
_LEAST_NBYTES = 16 << 20
KEEP_FREE_NBYTES = 256 << 20
Mode = Literal["direct", "buffered"]


@dataclass(frozen=True, slots=True)
class Trials:
    """The read speeds of one way to read, in bytes per second, one for each round."""

    mode: Mode
    request_nbytes: int
    depth: int
    bytes_per_s: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median bytes per second."""
        return statistics.median(self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a disk was measured to do, cold.

    `direct` and `buffered` are the fastest ways of each kind by median, None where there is none;
    `direct_refused` says why direct reads are not possible here. `fresh` marks a file written for
    the measurement. `notes` are sentences for the user.
    """

    path: str
    file_system: FileSystem
    file_nbytes: int
    fresh: bool
    trials: tuple[Trials, ...]
    direct_refused: str | None
    wall_s: float
    notes: tuple[str, ...] = ()

    @property
    def direct(self) -> Trials | None:
        """Return the fastest direct way to read."""
        return self._fastest("direct")

    @property
    def buffered(self) -> Trials | None:
        """Return the fastest buffered way to read."""
        return self._fastest("buffered")

    @property
    def bytes_per_s(self) -> float:
        """Return the fastest median of all."""
        return max(t.median for t in self.trials)

    def better_than(self, request_nbytes: int, depth: int) -> Trials | None:
        """Return the fastest direct way that beat this one in every round, None where none did."""
        direct = [t for t in self.trials if t.mode == "direct"]
        mine = next((t for t in direct if (t.request_nbytes, t.depth) == (request_nbytes, depth)), None)
        if mine is None:
            return None
        better = [t for t in direct if min(t.bytes_per_s) > max(mine.bytes_per_s)]
        return max(better, key=lambda t: t.median, default=None)

    def _fastest(self, mode: Mode) -> Trials | None:
        of_mode = [t for t in self.trials if t.mode == mode]
        return max(of_mode, key=lambda t: t.median, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the measurement as plain values for JSON; speeds in bytes per second."""
        facts = asdict(self)
        for name, best in (("direct", self.direct), ("buffered", self.buffered)):
            facts[name] = best and {
                "bytes_per_s": best.median,
                "request_nbytes": best.request_nbytes,
                "depth": best.depth,
            }
        return facts


def disk(
    path: Path | str,
    nbytes: int = 256 << 20,
    limit_s: float = 2.5,
    ways: Sequence[tuple[int, int]] = WAYS,
    rounds: int = 3,
) -> DiskSpeed:
    """Measure how fast `path` reads with nothing cached, in about `limit_s` seconds.

    A file is read where it lies (pages of it that were cached are dropped); for a folder `nbytes`
    are written to a file without a name, which the system removes whatever happens. `ways` (bytes a
    request, requests in flight), direct and buffered, take turns for `rounds` rounds, so that a
    busy moment hits all of them. Raises ConfigError when the path cannot be used, and OSError from
    a disk that fails.
    """
    if not hasattr(os, "preadv"):
        raise ConfigError("this system has no preadv: its disks cannot be measured, nor streamed from")
    began = time.monotonic()
    path = Path(path)
    with _opened(path, nbytes, limit_s / 3) as (fd, size, fresh):
        reader = DirectReader(fd, size)
        refused = reader.refusal()
        reader.drop()
        stays = cached_nbytes(fd) or 0
        modes: tuple[Mode, ...] = ("buffered",) if refused else ("direct", "buffered")
        tried = [(mode, *way) for mode in modes for way in ways if way[0] * way[1] <= size]
        slice_s = max(0.005, (limit_s - (time.monotonic() - began)) / (len(tried) * rounds))
        speeds: dict[tuple[Mode, int, int], list[float]] = {way: [] for way in tried}
        for _ in range(rounds):
            for way in tried:
                speeds[way].append(reader.measure(*way, slice_s))
    where = file_system(path)
    trials = tuple(Trials(*way, tuple(speeds[way])) for way in tried)
    return DiskSpeed(
        path=str(path),
        file_system=where,
        file_nbytes=size,
        fresh=fresh,
        trials=trials,
        direct_refused=refused,
        wall_s=time.monotonic() - began,
        notes=(*_place_notes(where, refused), *cache_notes(trials, fresh, stays / size)),
    )


def _place_notes(where: FileSystem, refused: str | None) -> Iterator[str]:
    if where.kind == "network":
        yield f"{where.fstype} is a network file system: its speed is the network's and may change"
    if where.kind == "memory":
        yield f"{where.fstype} keeps its files in memory: what is streamed from it is held already"
    if where.kind == "overlay":
        yield "an overlay file system: files of lower layers may lie on another disk"
    if refused:
        yield f"direct reads are refused ({refused}): reads go through the page cache"


def cache_notes(trials: Sequence[Trials], fresh: bool, stays: float) -> Iterator[str]:
    """Yield what says that a measurement was not, or not only, the disk's."""
    if fresh:
        yield "measured on a file just written, which the drive or a host may still have cached"
    if stays > 0.05 and not fresh:
        yield f"{stays:.0%} of the file stays cached (a process maps it): buffered is not cold"
    first = statistics.median(t.bytes_per_s[0] for t in trials)
    later = [speed for t in trials for speed in t.bytes_per_s[1:]]
    if later and first < 0.6 * statistics.median(later):
        yield (
            f"the first round read at {first / 1e9:.2f} GB/s, later ones at "
            f"{statistics.median(later) / 1e9:.2f}: a cache below this system keeps what was read"
        )


def cached_nbytes(file: int | Path | str) -> int | None:
    """Return how much of a file is in the page cache, None where the system does not tell.

    `file` is a path or a descriptor open for reading; whole pages are counted.
    """
    if sys.platform not in ("linux", "darwin"):
        return None
    if not isinstance(file, int):
        with regular.opened(file) as opened:
            return cached_nbytes(opened.fileno())
    size, page = os.fstat(file).st_size, mmap.PAGESIZE
    if size == 0:
        return 0
    # ACCESS_COPY is private and writable, which ctypes asks for; mincore touches no page of it.
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * (-(-size // page)))()
        start = ctypes.c_ubyte.from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(start))
        failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages)
        del start
    return None if failed else page * bytes(pages).translate(_FIRST_BIT).count(1)


@contextlib.contextmanager
def _opened(path: Path, nbytes: int, write_s: float) -> Iterator[tuple[int, int, bool]]:
    """Yield (descriptor, bytes in it, whether it was written now)."""
    if path.is_dir():
        size = min(nbytes, shutil.disk_usage(path).free - KEEP_FREE_NBYTES)
        if size < _LEAST_NBYTES:
            raise ConfigError(
                f"{path} has {format_nbytes(shutil.disk_usage(path).free)} free; measuring needs "
                f"{format_nbytes(_LEAST_NBYTES + KEEP_FREE_NBYTES)}: name another folder or a file"
            )
        try:
            file = tempfile.TemporaryFile(dir=path, buffering=0)  # noqa: SIM115 (used as one below)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error}): name a file to read") from error
        with file:
            yield file.fileno(), fill(file.fileno(), size, write_s), True
        return
    try:
        fd = regular.descriptor(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): name a folder or a file") from error
    try:
        size = os.fstat(fd).st_size // ALIGNMENT * ALIGNMENT
        if size < _LEAST_NBYTES:
            raise ConfigError(
                f"{path} has {format_nbytes(size)}; measuring needs {format_nbytes(_LEAST_NBYTES)}: "
                f"name a larger file or its folder"
            )
        yield fd, size, False
    finally:
        os.close(fd)


def fill(fd: int, nbytes: int, limit_s: float) -> int:
    """Write up to `nbytes` that do not compress until the time is up; return how many."""
    until, written, block = time.monotonic() + limit_s, 0, os.urandom(4 << 20)
    while written < nbytes and (written < _LEAST_NBYTES or time.monotonic() < until):
        written += os.write(fd, block[: nbytes - written])
        if written % (32 << 20) == 0:
            os.fsync(fd)  # so that the time counts the disk, and the pages are clean and can go
    os.fsync(fd)
    return written // ALIGNMENT * ALIGNMENT


class DirectReader:
    """Reads one file by turns directly and through the page cache, never the same place in a row."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._at = 0

    def refusal(self) -> str | None:
        """Return why the file cannot be read directly, None when it can."""
        try:
            self.set_direct(True)
            with mmap.mmap(-1, ALIGNMENT) as buffer:
                os.preadv(self._fd, [buffer], 0)
        except OSError as error:
            return os.strerror(error.errno or 0)
        return None

    def measure(self, mode: Mode, request: int, depth: int, limit_s: float) -> float:
        """Return the bytes per second of `depth` threads reading requests until the time is up."""
        # At least one request a thread; at most the whole file, whose pages would be cached after.
        turns, most = count(), self._size // request
        with contextlib.ExitStack() as stack:
            # One for all threads: nobody looks at what arrives, and no more memory is held.
            buffer = stack.enter_context(mmap.mmap(-1, request))
            pool = stack.enter_context(ThreadPoolExecutor(depth))
            buffer.write(bytes(request))  # its pages are there before the clock starts
            stack.callback(self.drop)
            self.drop()
            self.set_direct(mode == "direct")
            began = time.monotonic()

            def work() -> int:
                nbytes = 0
                while (turn := next(turns)) < most:
                    nbytes += self.read(buffer, request, turn)
                    if time.monotonic() - began >= limit_s:
                        break
                return nbytes

            total = sum(f.result() for f in [pool.submit(work) for _ in range(depth)])
            took = time.monotonic() - began
        self._at = (self._at + total) % self._size
        return total / took

    def read(self, buffer: mmap.mmap, request: int, turn: int) -> int:
        """Read the `turn`-th request from where the last measurement stopped, wrapping around."""
        start = (self._at // request + turn) % (self._size // request) * request
        done = 0
        with memoryview(buffer) as view:
            while done < request:
                with view[done:] as rest:
                    got = os.preadv(self._fd, [rest], start + done)
                if got == 0:
                    raise OSError(f"the file ended at {start + done}, it had {self._size} bytes")
                done += got
        return done

    def drop(self) -> None:
        """Let the page cache forget the file; pages that a process maps stay."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(READAHEAD_S)  # pages that are still being read ahead are locked, and stay
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def set_direct(self, on: bool) -> None:
        """Turn direct reads on or off; raises OSError where the file system refuses them."""
        import fcntl  # not on every system, and the facts without a disk are

        if sys.platform == "darwin":
            fcntl.fcntl(self._fd, fcntl.F_NOCACHE, int(on))
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
