from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import numpy as np
import pytest

from blockstream.engine.arena import HUGE_PAGE, PAGE, Arena
from blockstream.errors import BudgetError
from blockstream.plan.segments import Extent

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def rss_anon() -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text).group(1)) * 1024


def test_a_view_begins_at_the_address_its_extent_says():
    arena = Arena(8 * PAGE)
    view = np.frombuffer(arena.view(Extent(PAGE + 64, 10)), np.uint8)
    assert view.ctypes.data == arena.address + PAGE + 64
    assert arena.address % HUGE_PAGE == 0


def test_views_share_the_bytes_of_the_arena():
    arena = Arena(PAGE)
    arena.view(Extent(0, 4))[:] = b"abcd"
    assert bytes(arena.view(Extent(1, 2))) == b"bc"


def test_the_size_is_rounded_up_to_whole_pages():
    assert Arena(1).nbytes == PAGE


@pytest.mark.parametrize("extent", [Extent(-1, 1), Extent(0, PAGE + 1), Extent(PAGE, 1)])
def test_an_extent_outside_the_arena_is_refused(extent):
    arena = Arena(PAGE)
    with pytest.raises(ValueError, match="leaves the arena"):
        arena.view(extent)
    with pytest.raises(ValueError, match="leaves the arena"):
        arena.discard(extent)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_arena_of_no_bytes_is_refused(nbytes):
    with pytest.raises(ValueError, match="positive"):
        Arena(nbytes)


@pytest.mark.parametrize("nbytes", [1 << 55, 1 << 70])
def test_an_arena_the_system_cannot_map_names_the_size_and_the_remedy(nbytes):
    with pytest.raises(BudgetError, match=f"{nbytes} bytes.*smaller"):
        Arena(nbytes)


@linux
def test_pages_are_private_anonymous_and_go_back_when_discarded():
    arena = Arena(64 << 20)
    before = rss_anon()
    arena.populate(Extent(0, 64 << 20))
    assert rss_anon() - before > 60 << 20
    assert arena.discard(Extent(0, 64 << 20)) == 64 << 20
    assert rss_anon() - before < 8 << 20


@linux
def test_several_threads_commit_an_extent_piece_by_piece(monkeypatch):
    monkeypatch.setattr("blockstream.engine.arena.COMMIT_NBYTES", 5 << 20)
    arena = Arena(64 << 20)
    before = rss_anon()
    assert arena.commit([Extent(4096, 16 << 20), Extent(20 << 20, 16 << 20)], threads=3)
    assert arena.touched_nbytes == 32 << 20
    assert 30 << 20 < rss_anon() - before < 38 << 20
    assert arena.commit([Extent(0, 0)])


def test_committing_stops_when_no_more_may_be_taken(monkeypatch):
    monkeypatch.setattr("blockstream.engine.arena.COMMIT_NBYTES", 1 << 20)
    arena = Arena(16 << 20)
    arena.view(Extent(0, 4 << 20))
    assert not arena.commit([Extent(0, 16 << 20)], threads=2, may=lambda: arena.touched_nbytes < 8 << 20)
    assert arena.touched_nbytes == 8 << 20, "what was there is not committed again"


@linux
def test_nothing_is_committed_before_it_is_touched():
    before = rss_anon()
    arena = Arena(256 << 20)
    assert rss_anon() - before < 8 << 20
    assert arena.touched_nbytes == 0


def test_discarding_drops_whole_pages_inside_the_extent_only():
    arena = Arena(4 * PAGE, huge_pages=False)
    arena.view(Extent(0, 4 * PAGE))[:] = b"x" * 4 * PAGE
    assert arena.discard(Extent(100, 2 * PAGE)) == PAGE
    left = bytes(arena.view(Extent(0, 4 * PAGE)))
    assert left == b"x" * PAGE + bytes(PAGE) + b"x" * 2 * PAGE
    assert arena.discard(Extent(1, PAGE)) == 0


def test_touched_bytes_count_each_page_once_until_it_is_discarded():
    arena = Arena(8 * PAGE)
    arena.view(Extent(10, 2 * PAGE))
    arena.view(Extent(PAGE, PAGE))
    assert arena.touched_nbytes == 3 * PAGE
    arena.discard(Extent(0, 2 * PAGE))
    assert arena.touched_nbytes == PAGE
    arena.view(Extent(0, PAGE))
    counts = arena.touched_nbytes, arena.peak_touched_nbytes, arena.discarded_nbytes
    assert counts == (2 * PAGE, 3 * PAGE, 2 * PAGE)


def test_an_array_keeps_the_mapping_alive_after_the_arena_is_gone():
    arena = Arena(PAGE)
    array = np.frombuffer(arena.view(Extent(0, 8)), np.uint8)
    array[:] = 7
    del arena
    gc.collect()
    assert array.tolist() == [7] * 8


@linux
def test_the_mapping_goes_with_the_last_view():
    def mapped() -> int:
        text = Path("/proc/self/statm").read_text()
        return int(text.split()[0]) * os.sysconf("SC_PAGE_SIZE")

    arena = Arena(1 << 30)
    view = arena.view(Extent(0, 1))
    del arena
    gc.collect()
    held = mapped()
    del view
    gc.collect()
    assert held - mapped() >= 1 << 30


@linux
def test_a_forked_child_does_not_inherit_the_arena():
    arena = Arena(PAGE)
    head = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := head.match(line):
            inside = int(found[1], 16) <= arena.address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "dc" in line.split()  # "do not copy on fork"
            return
    pytest.fail("the arena is not mapped")
