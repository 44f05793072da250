"""Weight files of packages: their records, and one mapped for evaluation.

A file begins with 64 bytes (u32 number of records, u32 version 2). A record is 64 bytes wherever a program
says: u32 0xDEADBEEF, u32 dtype, u64 size in bytes, u64 offset of the data, u64 padding in bits; the data
begins at a multiple of 64. Everything is little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from blockstream.checkpoint.read.entries import unreadable
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .program import Blob

#: blob(offset, nbytes): the bytes of the record at an offset of the weight file, as uint8 [nbytes].
BlobReader = Callable[[int, int], Tensor]

VERSION = 2
SENTINEL = 0xDEADBEEF
ALIGN = 64
_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
#: The dtypes of records, by their number in the file.
DTYPES = {
    1: "FLOAT16",
    2: "FLOAT32",
    3: "UINT8",
    4: "INT8",
    5: "BFLOAT16",
    6: "INT16",
    7: "UINT16",
    8: "INT4",
    9: "UINT1",
    10: "UINT2",
    11: "UINT4",
    12: "UINT3",
    13: "UINT6",
    14: "INT32",
    15: "UINT32",
}
_AGAIN = "copy or export the package again"


@dataclass(frozen=True, slots=True)
class Record:
    """Where a blob's data lies: `nbytes` from `offset` of the file."""

    dtype: str
    offset: int
    nbytes: int


def read_records(path: Path, blobs: Iterable[Blob]) -> dict[int, Record]:
    """Return the records of blobs by their offset, each checked against what the program declares.

    Raises CheckpointError for a file that is no weight file, ends early, or says otherwise than the program.
    """
    try:
        with regular.opened(path) as stream:
            file_nbytes = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEADER.size)
            _check_header(path, head)
            found = {}
            for blob in blobs:
                stream.seek(blob.offset)
                found[blob.offset] = _record(path, file_nbytes, blob, stream.read(_RECORD.size))
            return found
    except OSError as error:
        raise unreadable(path, error) from error


def _check_header(path: Path, head: bytes) -> None:
    if len(head) < _HEADER.size:
        raise CheckpointError(f"{path}: has {len(head)} bytes and no header; {_AGAIN}")
    version = _HEADER.unpack(head)[1]
    if version != VERSION:
        raise CheckpointError(
            f"{path}: is a weight file of version {version}, version {VERSION} is read; {_AGAIN}"
        )


def _record(path: Path, file_nbytes: int, blob: Blob, text: bytes) -> Record:
    what = f"{path}: the record of {blob.name!r} at byte {blob.offset}"
    if len(text) < _RECORD.size:
        raise CheckpointError(f"{what} lies past the file's {file_nbytes} bytes: it was cut short; {_AGAIN}")
    sentinel, number, nbytes, offset, _ = _RECORD.unpack(text)
    if sentinel != SENTINEL:
        raise CheckpointError(
            f"{what} begins with {sentinel:#x}, not {SENTINEL:#x}: the file is damaged or the program names "
            f"a wrong place; {_AGAIN}"
        )
    dtype = DTYPES.get(number, f"number {number}")
    if (dtype, nbytes) != (blob.type.dtype, blob.type.nbytes):
        raise CheckpointError(
            f"{what} says {nbytes} bytes of {dtype}, and the program declares {blob.type}, "
            f"{blob.type.nbytes} bytes: weights and program do not belong together; {_AGAIN}"
        )
    if offset % ALIGN or offset < ALIGN:
        raise CheckpointError(f"{what} puts its data at byte {offset}, no multiple of {ALIGN}; {_AGAIN}")
    if offset + nbytes > file_nbytes:
        raise CheckpointError(
            f"{what} says its {nbytes} bytes begin at {offset}, and the file ends at byte {file_nbytes}: it "
            f"was cut short; {_AGAIN}"
        )
    return Record(dtype, offset, nbytes)


class MappedWeights:
    """The blobs of a weight file, mapped: a weight takes memory only while its pages are in the cache.

    The map goes with the last tensor made of it. Writing to one changes a private copy, never the file.
    """

    def __init__(self, path: Path, blobs: Iterable[Blob]) -> None:
        self.path = path
        self._records = read_records(path, blobs)
        self._bytes: Tensor | None = None
        try:
            with regular.opened(path) as stream:
                view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
        self._bytes = torch.frombuffer(view, dtype=torch.uint8)

    def __call__(self, offset: int, nbytes: int) -> Tensor:
        """Return the data of the record at an offset, uint8 [nbytes]."""
        record = self._records.get(offset)
        if self._bytes is None or record is None or record.nbytes != nbytes:
            raise CheckpointError(
                f"{self.path}: has no open record of {nbytes} bytes at {offset}; map the function's own blobs"
            )
        return self._bytes[record.offset : record.offset + nbytes]

    def close(self) -> None:
        """Let the map go."""
        self._bytes = None

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
