"""Files that lie on no disk of this machine: a `Source` reads them, headers, tensors and all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from blockstream.system import regular

from .entries import FileStamp, Source
from .safetensors_header import Header, length_of_header, parse_header

PIECE_NBYTES = 1 << 20


class SourceFile:
    """A file that the source of its stamp reads, in the place of a `ReadFile`."""

    def __init__(self, stamp: FileStamp) -> None:
        assert stamp.source is not None
        self.path = stamp.path
        self._stamp, self._source = stamp, stamp.source

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`, or raise CheckpointError."""
        self._source.read(self._stamp, offset, into)

    def changes(self, stamp: FileStamp) -> list[str]:
        """Return in words what differs from the file that was stamped."""
        return self._source.changes(stamp)


def header_from(source: Source, path: Path, nbytes: int, version: str = "") -> Header:
    """Return the validated header of a safetensors file of so many bytes that a source reads.

    `version`: what tells the file from others of its name, such as an ETag; it goes into the stamp's hash.
    Raises CheckpointError for what the source cannot read, and for anything the specification forbids.
    """
    first = FileStamp(path, nbytes, 0, 0, min(8, nbytes), "", source)
    length = _bytes(first, 0, min(8, nbytes))
    header_nbytes = 8 + length_of_header(path, length, nbytes)
    text = _bytes(first, 8, header_nbytes - 8)
    digest = hashlib.sha256(version.encode() + length + text).hexdigest()
    return parse_header(text, FileStamp(path, nbytes, 0, 0, header_nbytes, digest, source))


def contents(file: FileStamp) -> Iterator[bytes]:
    """Yield all bytes of a file, a piece at a time, from wherever it lies."""
    if file.source is None:
        with regular.opened(file.path) as stream:
            while piece := stream.read(PIECE_NBYTES):
                yield piece
        return
    for at in range(0, file.nbytes, PIECE_NBYTES):
        yield _bytes(file, at, min(PIECE_NBYTES, file.nbytes - at))


def _bytes(file: FileStamp, offset: int, nbytes: int) -> bytes:
    into = bytearray(nbytes)
    assert file.source is not None
    file.source.read(file, offset, memoryview(into))
    return bytes(into)
