"""What a checkpoint says about its bytes: the file's stamp and one entry a tensor. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blockstream.errors import CheckpointError
from blockstream.system import regular

#: Bytes of one element, by the names safetensors uses.
ITEM_NBYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "C128": 16,
}
#: Bits of one element of what is shorter than a byte: such tensors are listed, and not read.
ITEM_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
#: Offsets and sizes must fit a signed 64-bit number, as they do in every file system.
MOST = 2**63 - 1


class Source(Protocol):
    """Where files lie that are on no disk of this machine: on a server, say. Several threads ask at once."""

    def read(self, file: FileStamp, offset: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `offset`.

        Raises CheckpointError, naming the file, where they cannot be had, or are another file's by now.
        """

    def changes(self, file: FileStamp) -> list[str]:
        """Return in words what differs from the file that was stamped; asked before and after each load."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """One file as it was when its header was read: what a later look at it is compared with.

    `mtime_ns` in nanoseconds. `header_hash` is the SHA-256, in hexadecimal, of the bytes that
    describe the tensors: `header_nbytes` from `header_offset` (a torch zip file's are at its end).
    `source` reads a file that is on no disk of this machine; `path` is then its name in messages.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    header_offset: int
    header_nbytes: int
    header_hash: str
    source: Source | None = field(default=None, repr=False)

    @classmethod
    def take(cls, stream: BinaryIO, path: Path, offset: int, nbytes: int) -> FileStamp:
        """Return the stamp of an open file whose header is `nbytes` from `offset`."""
        stat = os.fstat(stream.fileno())
        digest = _hash(stream, offset, nbytes)
        return cls(path, stat.st_size, stat.st_mtime_ns, offset, nbytes, digest)

    def changes(self, now: os.stat_result) -> list[str]:
        """Return in words what a `stat` of the file shows to differ from this stamp."""
        found = []
        if now.st_nlink == 0 and not _names(self.path, now):
            found.append("it was deleted or replaced")
        if now.st_size != self.nbytes:
            found.append(f"its size was {self.nbytes} bytes and is {now.st_size}")
        if now.st_mtime_ns != self.mtime_ns:
            found.append(f"its modification time was {self.mtime_ns} ns and is {now.st_mtime_ns}")
        return found

    def check(self) -> None:
        """Refuse a file that is not the one whose header was read: size, time and header's hash.

        Raises CheckpointError saying what changed.
        """
        try:
            found = self._looked_at() if self.source is None else self.source.changes(self)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if found:
            raise CheckpointError(
                f"{self.path}: has changed since its header was read: {', '.join(found)}; "
                "open the checkpoint again"
            )

    def _looked_at(self) -> list[str]:
        with regular.opened(self.path) as stream:
            found = self.changes(os.fstat(stream.fileno()))
            if not found and _hash(stream, self.header_offset, self.header_nbytes) != self.header_hash:
                found = ["its header is another"]
        return found


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: `nbytes` from `offset` of a file, contiguous, little-endian.

    `coded` says how they stand for the weight where they are not its numbers: `dtype` is then the name of
    the format (`checkpoint.formats`), `name` and `shape` are the weight's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: FileStamp
    offset: int
    nbytes: int
    coded: Coded | None = field(default=None, compare=False)

    @property
    def end(self) -> int:
        """Return the first byte after the tensor in its file."""
        return self.offset + self.nbytes


class Row(Protocol):
    """What a weight must know of its format's row of the table (`checkpoint.formats.Format`)."""

    @property
    def name(self) -> str:
        """Return the format's name."""

    @property
    def by_row(self) -> bool:
        """Return whether each item along the first dimension has bytes of its own."""

    def widen(self) -> Callable[[Any], Any]:
        """Return the function that widens."""


@dataclass(frozen=True, slots=True)
class Coded:
    """How one weight is coded: the tensors beside it by their part in it, and what else its layer must know.

    `stored` is the name its own bytes have in the file, `beside` are the tensors its layer reads, `dropped`
    the names of those that only say what is known already; `row` is the format's in the table.
    """

    stored: str
    beside: Mapping[str, TensorEntry] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    row: Row | None = None


@dataclass(frozen=True)
class Tensors:
    """What a row looks for its weights in: a checkpoint's tensors by name and what its config says.

    `settings` is `quantization_config`, empty where there is none. `read(entry)` returns the bytes of a small
    tensor.
    """

    entries: Mapping[str, TensorEntry]
    settings: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[TensorEntry], bytes] = lambda entry: b""

    @property
    def method(self) -> str:
        """Return `quantization_config.quant_method`, empty where there is none."""
        return str(self.settings.get("quant_method", ""))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file the system refuses to open or read."""
    return CheckpointError(
        f"{path}: cannot be read: {error.strerror or error}; check the path and its permissions"
    )


def _names(path: Path, stat: os.stat_result) -> bool:
    """Return whether a path leads to the file of a `stat`; some file systems count no links."""
    try:
        return os.path.samestat(os.stat(path), stat)
    except OSError:
        return False


def _hash(stream: BinaryIO, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    stream.seek(offset)
    while nbytes > 0 and (text := stream.read(min(nbytes, 1 << 20))):
        digest.update(text)
        nbytes -= len(text)
    return digest.hexdigest()


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a contiguous tensor; KeyError for a dtype without a fixed size."""
    if dtype in ITEM_BITS:
        return -(-prod(shape) * ITEM_BITS[dtype] // 8)
    return prod(shape) * ITEM_NBYTES[dtype]


def check_extents(path: Path, extents: Iterable[tuple[str, int, int]], start: int, end: int) -> None:
    """Refuse extents (name, offset, end) that overlap or leave [start, end) of a file.

    Raises CheckpointError naming the file, the tensors and the numbers.
    """
    ordered = sorted(extents, key=lambda e: (e[1], e[2]))
    for name, a, b in ordered:
        if not start <= a <= b <= end:
            raise CheckpointError(
                f"{path}: {name!r} lies at bytes {a} to {b}, the file holds data from {start} to "
                f"{end}; the file is truncated or damaged: fetch it again"
            )
    for (name, _, b), (other, a, _) in pairwise(e for e in ordered if e[1] < e[2]):
        if a < b:
            raise CheckpointError(
                f"{path}: {name!r} ends at byte {b}, after {other!r} begins at {a}; two tensors of "
                "such a file cannot overlap: fetch it again"
            )
