"""How one segment is read into its room: the values a plan of reads is made of.

Offsets called room offsets are relative to the room, the extent of the arena a load is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .entries import FileStamp, TensorEntry, tensor_nbytes


@dataclass(frozen=True, slots=True)
class Request:
    """One parameter to be bound: from one tensor, or from several read to adjacent places.

    `dtype` None keeps the file's. `shape` None is the tensor's own, or (n, *shape) for n tensors.
    """

    param: str
    tensors: tuple[TensorEntry, ...]
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


class Move(NamedTuple):
    """Move bytes inside the room; the ranges may overlap, downwards."""

    src: int
    dst: int
    nbytes: int


class Read(NamedTuple):
    """Read `nbytes` at `offset` of a file to `room_offset`; the file may end after `need` bytes.

    `moves` align what landed misaligned, in order of `src`: each may be made, from its start on, as
    soon as the read has brought the bytes, while what follows is still being read.
    """

    file: FileStamp
    offset: int
    nbytes: int
    need: int
    room_offset: int
    moves: tuple[Move, ...] = ()


class Part(NamedTuple):
    """Bring elements from `src` to `dst` of the room, from one dtype to another."""

    src: int
    dst: int
    elements: int
    src_dtype: str
    dst_dtype: str

    @property
    def src_nbytes(self) -> int:
        """Return the bytes taken."""
        return tensor_nbytes(self.src_dtype, (self.elements,))

    @property
    def dst_nbytes(self) -> int:
        """Return the bytes written."""
        return tensor_nbytes(self.dst_dtype, (self.elements,))


class Chunk(NamedTuple):
    """One staged read and what is taken from it; consecutive chunks use different areas."""

    read: Read
    parts: tuple[Part, ...]


class Placed(NamedTuple):
    """Where a parameter lies in the room: `offset` is a multiple of 64."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the parameter's bytes."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class SegmentLayout:
    """How a segment is read and where its parameters lie, relative to its room.

    `nbytes` is the room it needs, padding and staging included; the room begins at a multiple of
    `align` in memory. `reads` come first, then `chunks`.
    """

    name: str
    nbytes: int
    align: int
    reads: tuple[Read, ...]
    chunks: tuple[Chunk, ...]
    tensors: dict[str, Placed]

    @cached_property
    def all_reads(self) -> tuple[Read, ...]:
        """Return the reads of a load, those of staged chunks included."""
        return (*self.reads, *(c.read for c in self.chunks))

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Return the moves of all reads."""
        return tuple(m for r in self.reads for m in r.moves)

    @cached_property
    def files(self) -> tuple[FileStamp, ...]:
        """Return the files a load reads, each once."""
        return tuple(dict.fromkeys(r.file for r in self.all_reads))

    @cached_property
    def read_nbytes(self) -> int:
        """Return the bytes one load reads from files."""
        return sum(min(r.nbytes, r.file.nbytes - r.offset) for r in self.all_reads)

    @cached_property
    def bound_nbytes(self) -> int:
        """Return the bytes of all parameters, those that share a place counted once."""
        return sum({t.offset: t.nbytes for t in self.tensors.values() if t.nbytes}.values())

    @cached_property
    def moved_nbytes(self) -> int:
        """Return the bytes one load moves inside the room for alignment."""
        return sum(m.nbytes for m in self.moves)

    @cached_property
    def converted_nbytes(self) -> int:
        """Return the bytes one load writes by conversion or stacking."""
        return sum(p.dst_nbytes for c in self.chunks for p in c.parts)
