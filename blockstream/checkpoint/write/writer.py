"""Write large files past the page cache, atomically: a temporary name until all is on the disk.

Two aligned buffers: while one is filled the other is hashed and written by a thread of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from blockstream.checkpoint.read.reader import BLOCK, aligned_buffer
from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import atomic

BUFFER_NBYTES = 8 << 20
#: Ends the name of a file that is not yet whole.
UNFINISHED = ".unfinished"
#: pwrite(descriptor, view, offset) -> bytes written; the seam where tests inject faults.
Pwrite = Callable[[int, memoryview, int], int]


class FileWriter:
    """A file being written from start to end; it takes its name when it is closed without error.

    `write` accepts any bytes. Leaving the context with an exception removes what was written.
    `sha256` is known after closing, in hexadecimal, when `hashed`. Raises CheckpointError when the
    disk refuses or is full.
    """

    def __init__(self, path: Path, *, hashed: bool = False, pwrite: Pwrite = os.pwrite) -> None:
        self.path = path
        self._unfinished = path.with_name(path.name + UNFINISHED)
        self._pwrite = pwrite
        self._hash = hashlib.sha256() if hashed else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        direct = getattr(os, "O_DIRECT", 0)
        try:
            try:
                self._descriptor = os.open(self._unfinished, flags | direct, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._descriptor = os.open(self._unfinished, flags, 0o666)
                direct = 0
        except OSError as error:
            raise self._refused(error) from error
        self._direct = bool(direct)
        self._buffers = [aligned_buffer(BUFFER_NBYTES) for _ in range(2)]
        self._filled = 0
        self._written = 0
        self._busy: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="blockstream-writer")

    @property
    def sha256(self) -> str:
        """Return the hash of all that was written; ValueError if the writer does not hash."""
        if self._hash is None:
            raise ValueError("this writer was not asked to hash")
        return self._hash.hexdigest()

    def tell(self) -> int:
        """Return the bytes accepted so far."""
        return self._written + self._filled

    def flush(self) -> None:
        """Do nothing: bytes reach the disk in whole buffers and on closing."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Accept bytes; return how many, always all."""
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            n = min(BUFFER_NBYTES - self._filled, len(view) - at)
            self._buffers[0][self._filled : self._filled + n] = view[at : at + n]
            self._filled += n
            at += n
            if self._filled == BUFFER_NBYTES:
                self._send()
        return len(view)

    def close(self) -> None:
        """Write the rest, bring the file to the disk, give it its name."""
        try:
            nbytes = self.tell()
            self._send()
            self._wait()
            os.ftruncate(self._descriptor, nbytes)
            atomic.sync(self._descriptor)
            if not self._direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._release()
            os.replace(self._unfinished, self.path)
            atomic.sync_folder(self.path.parent)
        except OSError as error:
            self.abort()
            raise self._refused(error) from error
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up: nothing is left of the file."""
        if self._busy is not None:
            with contextlib.suppress(Exception):
                self._busy.result()
        self._release()
        self._unfinished.unlink(missing_ok=True)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _send(self) -> None:
        """Hand the filled buffer to the thread once it is done with the other."""
        self._wait()
        if self._filled:
            view, offset = self._buffers[0][: self._filled], self._written
            self._busy = self._pool.submit(self._store, view, offset)
            self._written += self._filled
            self._filled = 0
            self._buffers.reverse()

    def _wait(self) -> None:
        busy, self._busy = self._busy, None
        if busy is not None:
            try:
                busy.result()
            except OSError as error:
                raise self._refused(error) from error

    def _store(self, view: memoryview, offset: int) -> None:
        """Hash and write one buffer; a last one is padded to the block and cut off on closing."""
        if self._hash is not None:
            self._hash.update(view)
        padded = memoryview(view.obj)[: -(-len(view) // BLOCK) * BLOCK]
        done = 0
        while done < len(view):
            rest = padded[done:] if self._direct else view[done:]
            try:
                done += self._pwrite(self._descriptor, rest, offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._write_buffered()
            if self._direct and done < len(view) and done % BLOCK:
                self._write_buffered()  # a short write inside a block

    def _write_buffered(self) -> None:
        """Go on through the page cache: the file system took the flag but not the writes."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self._direct = False

    def _release(self) -> None:
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _refused(self, error: OSError) -> CheckpointError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(
                f"{self.path}: the disk is full; free some space and run the same command again"
            )
        return CheckpointError(
            f"{self.path}: cannot be written: {error.strerror or error}; check the folder and its permissions"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against another process that writes to it; it is made if need be."""
    try:
        atomic.make_folder(folder)
        held = contextlib.ExitStack()
        held.enter_context(atomic.locked(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made or opened: {error.strerror}") from error
    except ConfigError:
        raise CheckpointError(
            f"{folder}: another process is writing to it; wait for it or choose another folder"
        ) from None
    with held:
        yield


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file atomically: readers see the old one or the new one, whole."""
    write_small(path.parent, {path.name: atomic.json_bytes(value)})


def write_small(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files of a folder, each atomically."""
    for name, data in files.items():
        with FileWriter(folder / name) as writer:
            writer.write(data)
