"""Plan how one segment is read: few large block-aligned reads, every tensor 64-byte aligned. Pure.

Kernels differ with the address of a weight, so a tensor's place is always a multiple of 64. A run
of tensors near each other in a file is one read, over-reading to block boundaries. What lands
misaligned is moved down inside the room by under 64 bytes, neighbours of equal misalignment in one
move; where two would overlap, the smaller goes to a spill after the read. Tensors that change
dtype, or are stacked from scattered places, pass in chunks through a small staging area.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from blockstream.errors import CheckpointError

from .convert import can_convert
from .entries import FileStamp, tensor_nbytes
from .requests import Chunk, Move, Part, Placed, Read, Request, SegmentLayout

ALIGN = 64
BLOCK = 4096
#: A gap between two tensors up to this size is cheaper to read over than to start a new read for.
GAP_NBYTES = 128 << 10
#: Where reads can be shifted for free, a tensor this large is worth a read of its own.
SPLIT_NBYTES = 1 << 20
#: The largest staged read; two such areas at most are part of the room.
STAGING_NBYTES = 4 << 20


class _Source(NamedTuple):
    """Contiguous elements of a file."""

    file: FileStamp
    offset: int
    nbytes: int
    dtype: str

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class _Want(NamedTuple):
    """A parameter's sources, merged where they adjoin, and its dtype: what a place is planned for.

    Parameters that want the same share the place, so tied weights stay tied.
    """

    sources: tuple[_Source, ...]
    dtype: str

    @property
    def in_place(self) -> bool:
        return len(self.sources) == 1 and self.sources[0].dtype == self.dtype


def lay_out(
    name: str, requests: Sequence[Request], *, block: int = BLOCK, memory_align: int = BLOCK
) -> SegmentLayout:
    """Return the layout of a segment that binds the requested parameters.

    `block` is what offsets and lengths of reads are multiples of, `memory_align` what addresses
    are: where a device takes finer ones than 64, reads are shifted and nothing needs to move.
    Raises CheckpointError for a request whose shape or dtype cannot be had.
    """
    if block % ALIGN or block % memory_align:
        raise ValueError(f"block {block} must be a multiple of {ALIGN} and of {memory_align}")
    wants = {r.param: _want(name, r) for r in requests}
    if len(wants) != len(requests):
        raise ValueError(f"segment {name!r} requests a parameter twice")
    planner = _Planner(block, memory_align)
    planner.place(dict.fromkeys(wants.values()))
    tensors = {
        r.param: Placed(planner.places[wants[r.param]], wants[r.param].dtype, _shape(r)) for r in requests
    }
    return SegmentLayout(
        name,
        max(_up(planner.end, block), block),
        block,
        tuple(planner.reads),
        tuple(planner.chunks),
        tensors,
    )


def _shape(r: Request) -> tuple[int, ...]:
    first = r.tensors[0]
    own = first.shape if len(r.tensors) == 1 else (len(r.tensors), *first.shape)
    return own if r.shape is None else r.shape


def _want(name: str, r: Request) -> _Want:
    """Return what a request asks for, checked against the tensors it names."""
    if not r.tensors:
        raise ValueError(f"parameter {r.param!r} of segment {name!r} names no tensor")
    first = r.tensors[0]
    dtype = r.dtype or first.dtype
    merged: list[_Source] = []
    have = 0
    for t in r.tensors:
        if not can_convert(t.dtype, dtype):
            raise CheckpointError(
                f"{t.file.path}: {t.name!r} is {t.dtype} and parameter {r.param!r} of segment "
                f"{name!r} needs {dtype}, which the loader cannot convert to; "
                "drop the dtype, or write the checkpoint in the dtype you need"
            )
        have += tensor_nbytes(dtype, t.shape)
        s, last = _Source(t.file, t.offset, t.nbytes, t.dtype), merged[-1] if merged else None
        if last and (last.file, last.end, last.dtype) == (s.file, s.offset, s.dtype):
            merged[-1] = last._replace(nbytes=last.nbytes + s.nbytes)
        else:
            merged.append(s)
    shape = _shape(r)
    single = len(r.tensors) == 1
    if have != tensor_nbytes(dtype, shape) or (single and shape not in (first.shape, (1, *first.shape))):
        own = f"{len(r.tensors)} tensors of " if len(r.tensors) > 1 else ""
        raise CheckpointError(
            f"{first.file.path}: {first.name!r} holds {own}shape {list(first.shape)} and parameter "
            f"{r.param!r} of segment {name!r} has {list(shape)}; "
            "is this the checkpoint of another model?"
        )
    return _Want(tuple(merged), dtype)


class _Planner:
    """Hands out places of the room from its start on."""

    def __init__(self, block: int, memory_align: int) -> None:
        self.block, self.memory_align = block, memory_align
        self.places: dict[_Want, int] = {}
        self.reads: list[Read] = []
        self.chunks: list[Chunk] = []
        self.end = 0

    def place(self, wants: Sequence[_Want] | dict[_Want, None]) -> None:
        """Place everything: what is read in place first, then what is staged, then the staging."""
        empty = [w for w in wants if not any(s.nbytes for s in w.sources)]
        self.places.update(dict.fromkeys(empty, 0))
        filled = [w for w in wants if w not in self.places]
        in_place = {w.sources[0]: w for w in filled if w.in_place}
        for run in self._runs(sorted(in_place, key=_by_place)):
            self._place_run(run, in_place)
        todo: list[tuple[_Source, str, int]] = []
        for w in filled:
            if not w.in_place:
                self.places[w] = self.end = _up(self.end, ALIGN)
                for s in w.sources:
                    todo.append((s, w.dtype, self.end))
                    self.end += _elements(s) * tensor_nbytes(w.dtype, (1,))
        self._stage(sorted(todo, key=lambda t: (*_by_place(t[0]), t[2])))

    def _runs(self, sources: Sequence[_Source]) -> Iterator[list[_Source]]:
        """Yield the sources, sorted by place, in groups that one read brings in."""
        run: list[_Source] = []
        largest = None
        for s in sources:
            if run and not self._joins(run[-1], largest or s, s):
                yield run
                run, largest = [], None
            run.append(s)
            if largest is None or s.nbytes > largest.nbytes:
                largest = s
        if run:
            yield run

    def _joins(self, last: _Source, largest: _Source, s: _Source) -> bool:
        """Return whether a source belongs to the read of those before it."""
        if last.file != s.file or not last.end <= s.offset <= last.end + GAP_NBYTES:
            return False
        worth_a_read = min(largest.nbytes, s.nbytes) >= SPLIT_NBYTES
        return not (worth_a_read and self._shift(largest) != self._shift(s))

    def _shift(self, s: _Source) -> int:
        """Return by how much a read is shifted in memory to align a source, 0 where it cannot."""
        shift = -s.offset % ALIGN
        return 0 if shift % self.memory_align else shift

    def _place_run(self, run: list[_Source], wants: dict[_Source, _Want]) -> None:
        """Place one run's read, and its sources after alignment."""
        weight: Counter[int] = Counter()
        for s in run:
            weight[self._shift(s)] += s.nbytes
        start, need_end = _down(run[0].offset, self.block), run[-1].end
        nbytes = _up(need_end, self.block) - start
        at = _up(self.end, self.block) + weight.most_common(1)[0][0]
        self.end = at + nbytes

        stay: list[tuple[_Source, int]] = []
        spilled: list[_Source] = []
        for s in run:
            place = _down(at + s.offset - start, ALIGN)
            while stay and stay[-1][1] + stay[-1][0].nbytes > place:
                if stay[-1][0].nbytes >= s.nbytes:
                    spilled.append(s)
                    break
                spilled.append(stay.pop()[0])
            else:
                stay.append((s, place))
        moves: list[Move] = []
        for s in spilled:
            place = self.places[wants[s]] = _up(self.end, ALIGN)
            self.end = place + s.nbytes
            moves.append(Move(at + s.offset - start, place, s.nbytes))
        for s, place in stay:
            self.places[wants[s]] = place
            moves.append(Move(at + s.offset - start, place, s.nbytes))
        # Ascending, and none reaches below its predecessor's end: what a move covers has moved on.
        moves = joined(sorted(m for m in moves if m.nbytes))
        self.reads.append(Read(run[0].file, start, nbytes, need_end - start, at, tuple(moves)))

    def _stage(self, todo: Sequence[tuple[_Source, str, int]]) -> None:
        """Cut what is staged into chunks that alternate between two areas at the end."""
        cuts: list[tuple[FileStamp, int, list[Part]]] = []  # file, start, parts relative to start
        for s, dtype, place in todo:
            item, out = tensor_nbytes(s.dtype, (1,)), tensor_nbytes(dtype, (1,))
            pos = s.offset
            while pos < s.end:
                if not (cuts and self._fits(cuts[-1], s.file, pos, item)):
                    cuts.append((s.file, _down(pos, self.block), []))
                _, start, parts = cuts[-1]
                elements = min(start + STAGING_NBYTES - pos, s.end - pos) // item
                parts.append(Part(pos - start, place, elements, s.dtype, dtype))
                pos, place = pos + elements * item, place + elements * out
        needs = [max(p.src + p.src_nbytes for p in parts) for _, _, parts in cuts]
        area = _up(max(needs, default=0), self.block)
        base = _up(self.end, self.block) if cuts else self.end
        for i, ((file, start, parts), need) in enumerate(zip(cuts, needs, strict=True)):
            at = base + i % 2 * area
            read = Read(file, start, _up(need, self.block), need, at)
            self.chunks.append(Chunk(read, tuple(p._replace(src=at + p.src) for p in parts)))
        self.end = base + area * min(2, len(cuts))

    @staticmethod
    def _fits(cut: tuple[FileStamp, int, list[Part]], file: FileStamp, pos: int, item: int) -> bool:
        """Return whether an element at `pos` is near enough to join a chunk and fits in it."""
        cut_file, start, parts = cut
        near = pos <= start + parts[-1].src + parts[-1].src_nbytes + GAP_NBYTES
        return cut_file == file and start <= pos and near and pos + item <= start + STAGING_NBYTES


def joined(moves: Sequence[Move]) -> list[Move]:
    """Return the moves that change anything, neighbours by the same distance made one."""
    found: list[Move] = []
    for m in moves:
        last = found[-1] if found else None
        down = m.dst <= m.src  # what lies between two places in the spill is another's
        if last and down and last.src - last.dst == m.src - m.dst:
            found[-1] = last._replace(nbytes=m.src + m.nbytes - last.src)
        else:
            found.append(m)
    return [m for m in found if m.src != m.dst]


def _elements(s: _Source) -> int:
    return s.nbytes // tensor_nbytes(s.dtype, (1,))


def _by_place(s: _Source) -> tuple[str, int, int]:
    return str(s.file.path), s.offset, s.nbytes


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _down(n: int, to: int) -> int:
    return n // to * to
