"""The rival that the benchmark shows: an LRU cache of segments never hits in a cyclic scan."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.lru import lru_ends
from tests.support.fakes import stage


def test_a_cache_one_segment_short_is_as_slow_as_none():
    ends = {capacity: lru_ends(stage(sizes=(1,) * 8, load=2.0), capacity, 5) for capacity in (2, 5, 7)}
    for passes in ends.values():
        assert [b - a for a, b in pairwise(passes)] == [8 * 2.0] * 4


def test_a_cache_of_everything_loads_once():
    passes = lru_ends(stage(sizes=(1,) * 8, load=2.0), 8, 5)
    assert [b - a for a, b in pairwise(passes)] == [8 * 1.0] * 4


def test_a_cache_that_cannot_overlap_is_refused():
    with pytest.raises(ValueError, match="the least is 2"):
        lru_ends(stage(), 1, 1)
