from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstream.checkpoint.read.convert import convert
from blockstream.checkpoint.read.entries import ITEM_NBYTES, FileStamp, TensorEntry, tensor_nbytes
from blockstream.checkpoint.read.placement import (
    ALIGN,
    BLOCK,
    GAP_NBYTES,
    SPLIT_NBYTES,
    STAGING_NBYTES,
    joined,
    lay_out,
)
from blockstream.checkpoint.read.requests import Move, Read, Request, SegmentLayout
from blockstream.errors import CheckpointError

FILES = {name: FileStamp(Path(name), 64 << 20, 0, 0, 8, "") for name in ("a", "b")}


def entry(offset: int, shape=(16,), dtype="F32", file="a", name="w") -> TensorEntry:
    return TensorEntry(name, dtype, shape, FILES[file], offset, tensor_nbytes(dtype, shape))


def content(file: FileStamp, offset: int, nbytes: int) -> bytes:
    """Return what the file of a test holds: a byte depends on its place and the file alone."""
    at = np.arange(offset, offset + nbytes, dtype=np.uint64)
    mixed = (at * np.uint64(2654435761) >> np.uint64(7)) ^ np.uint64(ord(file.path.name[0]))
    return (mixed & np.uint64(0xFF)).astype(np.uint8).tobytes()


def run(layout: SegmentLayout) -> bytearray:
    """Return the room after a load, done the plainest way."""
    room = bytearray(layout.nbytes)

    def read(r: Read) -> None:
        room[r.room_offset : r.room_offset + r.nbytes] = content(r.file, r.offset, r.nbytes)

    for r in layout.reads:
        read(r)
        for m in r.moves:
            room[m.dst : m.dst + m.nbytes] = room[m.src : m.src + m.nbytes]
    for c in layout.chunks:
        read(c.read)
        for p in c.parts:
            src = memoryview(bytes(room[p.src : p.src + p.src_nbytes]))
            dst = memoryview(room)[p.dst : p.dst + p.dst_nbytes]
            convert(src, p.src_dtype, dst, p.dst_dtype)
    return room


def wanted(request: Request) -> bytes:
    out = b""
    for t in request.tensors:
        raw = content(t.file, t.offset, t.nbytes)
        dst = request.dtype or t.dtype
        room = bytearray(len(raw) // ITEM_NBYTES[t.dtype] * ITEM_NBYTES[dst])
        convert(memoryview(raw), t.dtype, memoryview(room), dst)
        out += bytes(room)
    return out


def check(requests: list[Request], memory_align: int = BLOCK) -> SegmentLayout:
    layout = lay_out("s", requests, memory_align=memory_align)
    room = run(layout)
    for request in requests:
        placed = layout.tensors[request.param]
        assert placed.offset % ALIGN == 0
        assert bytes(room[placed.offset : placed.offset + placed.nbytes]) == wanted(request)
    spans = sorted({(t.offset, t.offset + t.nbytes) for t in layout.tensors.values() if t.nbytes})
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= layout.nbytes if spans else True
    assert layout.nbytes % BLOCK == 0
    for r in layout.reads:
        assert list(r.moves) == sorted(r.moves)
        for m in r.moves:  # made while later bytes of the read are still to come
            later = r.room_offset + r.nbytes
            assert m.dst < m.src or m.dst >= later
    for r in layout.all_reads:
        assert r.offset % BLOCK == r.nbytes % BLOCK == r.room_offset % memory_align == 0
        assert 0 <= r.room_offset <= layout.nbytes - r.nbytes
        assert r.nbytes - BLOCK < r.need <= r.nbytes
    return layout


@st.composite
def requests(draw) -> list[Request]:
    """Tensors at arbitrary places of two files, some overlapping, odd-sized, tied, stacked, cast."""
    entries = []
    for file in FILES:
        offset = draw(st.integers(0, 10_000))
        for _ in range(draw(st.integers(0, 8))):
            dtype = draw(st.sampled_from(["F32", "F16", "BF16", "U8"]))
            count = draw(st.one_of(st.integers(0, 40), st.integers(0, 9000)))
            entries.append(entry(offset, (count,), dtype, file))
            step = draw(st.sampled_from([0, 0, 0, 0, 1, 4, 64, 3000, 200_000, -100]))
            offset = max(0, entries[-1].end + step)
    out = []
    for i, e in enumerate(entries):
        dtype = draw(st.sampled_from([None, None, "F32", "BF16", "F16"]))
        out.append(Request(f"p{i}", (e,), None if e.dtype == "U8" else dtype))
    for k in range(draw(st.integers(0, 2))):
        group = draw(st.lists(st.sampled_from(entries), min_size=1, max_size=4)) if entries else []
        group = [e for e in group if e.dtype == group[0].dtype]
        if group:
            shape = (sum(e.shape[0] for e in group),)
            if len(group) > 1 or shape == group[0].shape:
                out.append(Request(f"s{k}", tuple(group), None, shape))
    return out


@settings(max_examples=300, deadline=None)
@given(requests(), st.sampled_from([BLOCK, 512, 64, 8, 4, 1]))
def test_every_parameter_is_whole_aligned_and_apart_from_the_others(wants, memory_align):
    check(wants, memory_align)


@pytest.mark.parametrize("residue", range(0, 64, 8))
def test_a_run_of_equal_misalignment_is_one_read_and_one_move(residue):
    wants = [Request(f"p{i}", (entry(4096 * 3 + residue + i * 640, (160,)),)) for i in range(50)]
    layout = check(wants)
    assert len(layout.reads) == 1
    assert len(layout.moves) == (1 if residue else 0)
    assert layout.moved_nbytes == (50 * 640 if residue else 0)
    assert layout.nbytes == layout.reads[0].nbytes  # moving needs no more room than reading


def test_where_addresses_are_free_nothing_needs_to_move():
    wants = [Request(f"p{i}", (entry(8 + i * 640, (160,)),)) for i in range(50)]
    assert check(wants, memory_align=4).moves == ()


def test_large_tensors_of_different_misalignment_get_a_read_each_where_that_spares_moves():
    n = SPLIT_NBYTES // 4
    wants = [
        Request("big", (entry(8, (n,)),)),
        Request("odd", (entry(8 + 4 * n, (1,)),)),
        Request("next", (entry(12 + 4 * n, (n,)),)),
    ]
    layout = check(wants, memory_align=4)
    assert (len(layout.reads), layout.moved_nbytes) == (2, 0)
    assert len(check(wants).reads) == 1


def test_a_large_aligned_tensor_stays_and_its_small_neighbour_moves():
    wants = [
        Request("odd", (entry(0, (5,), "U8"),)),
        Request("odd2", (entry(5, (59,), "U8"),)),
        Request("big", (entry(64, (100_000,)),)),
    ]
    layout = check(wants)
    assert layout.tensors["big"].offset == 64
    assert layout.moved_nbytes == 64


def test_tensors_with_a_wide_gap_between_are_read_apart():
    near = [Request("a", (entry(0),)), Request("b", (entry(64 + GAP_NBYTES),))]
    wide = [Request("a", (entry(0),)), Request("b", (entry(64 + GAP_NBYTES + 64),))]
    assert [len(check(w).reads) for w in (near, wide)] == [1, 2]


def test_tied_parameters_share_one_place_and_are_read_once():
    layout = check([Request("a", (entry(0),)), Request("b", (entry(0, name="other"),))])
    assert layout.tensors["a"] == layout.tensors["b"]
    assert layout.bound_nbytes == 64


def test_adjacent_tensors_stack_without_a_copy_and_scattered_ones_through_staging():
    adjacent = Request("a", (entry(0), entry(64), entry(128)))
    layout = check([adjacent])
    assert layout.tensors["a"].shape == (3, 16)
    assert (layout.chunks, layout.moves) == ((), ())
    scattered = Request("a", (entry(128), entry(0), entry(640, file="b")))
    layout = check([scattered])
    assert layout.tensors["a"].shape == (3, 16)
    assert (len(layout.reads), layout.converted_nbytes) == (0, 192)


def test_a_large_conversion_needs_little_more_room_than_its_result():
    n = 8 << 20
    layout = check([Request("a", (entry(4, (n,)),), "BF16")])
    assert layout.nbytes <= 2 * n + 2 * STAGING_NBYTES + BLOCK
    assert len(layout.chunks) > 8
    areas = [c.read.room_offset for c in layout.chunks]
    assert all(a != b for a, b in pairwise(areas))


def test_moves_to_the_spill_are_not_joined_over_what_lies_between():
    moves = [Move(10, 1000, 4), Move(30, 1020, 4)]
    assert joined(moves) == moves
    assert joined([Move(108, 100, 4), Move(128, 120, 4)]) == [Move(108, 100, 24)]


def test_ten_thousand_tensors_are_laid_out_in_a_few_reads():
    wants = [Request(f"p{i}", (entry(i * 68 + 4, (17,)),)) for i in range(10_000)]
    assert len(check(wants).reads) == 1


def test_a_segment_of_nothing_has_a_room_all_the_same():
    assert check([]).nbytes == BLOCK
    layout = check([Request("empty", (entry(7, (0,)),))])
    assert layout.reads == ()


def test_a_shape_or_dtype_that_cannot_be_had_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"'w' holds shape \[16\].*'p'.*\[4, 4\]"):
        lay_out("s", [Request("p", (entry(0),), None, (4, 4))])
    with pytest.raises(CheckpointError, match="2 tensors of shape"):
        lay_out("s", [Request("p", (entry(0), entry(64)), None, (3, 16))])
    with pytest.raises(CheckpointError, match=r"'w' is U8 and parameter 'p'.*needs F32"):
        lay_out("s", [Request("p", (entry(0, dtype="U8"),), "F32")])


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="twice"):
        lay_out("s", [Request("p", (entry(0),)), Request("p", (entry(64),))])
    with pytest.raises(ValueError, match="no tensor"):
        lay_out("s", [Request("p", ())])
    with pytest.raises(ValueError, match="multiple"):
        lay_out("s", [], block=100)
