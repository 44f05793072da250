"""Eq. 8 and Eq. 9 as published, the overhead they leave, the bounds nothing beats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.plan import latency
from blockstream.plan.segments import Exactly, Segment, Stage
from tests.support.fakes import stage

seconds = st.floats(0.001, 100)
blocks = st.integers(1, 60)


@st.composite
def settings_of_eq_9(draw):
    b = draw(blocks)
    return b, draw(st.integers(0, b)), draw(seconds), draw(seconds)


# -- the equations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "l", "e", "alpha", "r"),
    [
        (28, 2.0, 1.0, 0.0, 28.0),  # loads dominate: all compute is hidden
        (28, 0.5, 1.0, 0.0, 14.0),  # compute dominates: all loads are hidden
        (28, 0.25, 0.75, 1.0, 6.0),  # a forward of 28 s takes 22
        (24, 5.5, 1.25, 3.0, 27.0),  # few seconds of compute to hide many of loading behind
    ],
)
def test_eq_8(b, l, e, alpha, r):
    assert latency.concurrent_saving_s(b, l, e, alpha) == r
    assert latency.concurrent_s(b, l, e, alpha) == b * (l + e) - r


@pytest.mark.parametrize(
    ("b", "d", "l", "e", "alpha", "r"),
    [
        (28, 0, 2.0, 1.0, 3.0, 28 - 3.0),  # nothing retained: Eq. 8
        (28, 14, 2.0, 1.0, 0.0, 28 + 14),
        (28, 14, 2.0, 1.0, 3.0, 28 + 14 - 1.5),  # half retained: half the overhead
        (28, 7, 0.5, 1.0, 0.0, 14),  # loads hidden anyway: retaining saves nothing
        (28, 28, 2.0, 1.0, 3.0, 56),  # everything retained: the loads alone, and no overhead
    ],
)
def test_eq_9(b, d, l, e, alpha, r):
    assert latency.dynamic_saving_s(b, d, l, e, alpha) == pytest.approx(r)
    assert latency.dynamic_s(b, d, l, e, alpha) == pytest.approx(b * (l + e) - r)


def test_measured_figures_of_the_paper_fix_l_e_and_alpha():
    """One forward of 28 blocks, 29 s in sequence and 23 s concurrently; T5, 24 blocks, 164 s and 137 s."""
    for b, sequential, concurrent, hidden in ((28, 29.0, 23.0, 0.25), (24, 164.0, 137.0, 0.2)):
        e = hidden * sequential / b
        l = sequential / b - e
        assert latency.sequential_s(b, l, e) == pytest.approx(sequential)
        alpha = latency.alpha_s(b, 0, l, e, concurrent)
        assert alpha == pytest.approx(hidden * sequential - (sequential - concurrent))
        assert latency.concurrent_s(b, l, e, alpha) == pytest.approx(concurrent)


def test_thirty_passes_of_eq_9_take_1260():
    assert 30 * latency.dynamic_s(28, 14, 2.0, 1.0) == 1260


@pytest.mark.parametrize("d", [-1, 29])
def test_more_blocks_than_there_are_cannot_be_retained(d):
    with pytest.raises(ValueError, match=f"d = {d} blocks cannot be retained of b = 28"):
        latency.dynamic_saving_s(28, d, 1.0, 1.0)


@given(settings_of_eq_9(), st.floats(0, 50))
def test_the_overhead_found_makes_eq_9_meet_the_measurement(setting, alpha):
    b, d, l, e = setting
    wall = latency.dynamic_s(b, d, l, e, alpha)
    found = latency.alpha_s(b, d, l, e, wall)
    assert found == pytest.approx(alpha if d < b else 0.0, abs=1e-6)


# -- bounds ------------------------------------------------------------------------------------


@given(settings_of_eq_9())
def test_what_is_faster_than_what(setting):
    b, d, l, e = setting
    slack = 1e-9 * b * (l + e)
    assert latency.spread_bound_s(b, d, l, e) <= latency.dynamic_s(b, d, l, e) + slack
    assert latency.dynamic_s(b, d, l, e) <= latency.concurrent_s(b, l, e) + slack
    assert latency.concurrent_s(b, l, e) <= latency.sequential_s(b, l, e) + slack


@given(settings_of_eq_9())
def test_equal_segments_one_visit_ahead_are_eq_9(setting):
    b, d, l, e = setting
    equal = stage(sizes=(1,) * b, load=l, execute=e)
    assert latency.one_ahead_s(equal, range(d)) == pytest.approx(latency.dynamic_s(b, d, l, e))


@given(settings_of_eq_9(), st.integers(1, 40))
def test_the_bound_of_a_stage_is_the_spread_bound_and_one_load_of_what_is_retained(setting, passes):
    b, d, l, e = setting
    equal = stage(sizes=(1,) * b, load=l, execute=e)
    bound = latency.bound_s(equal, range(d), passes)
    assert bound == pytest.approx(max(passes * b * e, passes * (b - d) * l + d * l))
    assert bound >= passes * latency.spread_bound_s(b, d, l, e) * (1 - 1e-9)


def test_unequal_segments_count_each_load_where_it_is_hidden():
    parts = (Segment("a", 1, load_s=5, execute_s=1), Segment("b", 1, load_s=2, execute_s=4))
    one = Stage("s", parts, passes=Exactly(3))
    assert latency.one_ahead_s(one) == max(1, 2) + max(4, 5)
    assert latency.one_ahead_s(one, {0}) == max(1, 2) + 4
    assert latency.bound_s(one) == 3 * max(5, 7)
    assert latency.bound_s(one, {0}) == max(15, 3 * 2 + 5)
    assert latency.bound_s(one, {0}, 0) == 0


def test_overlap_is_the_share_of_loading_that_compute_did_not_wait_for():
    assert latency.overlap(4.0, 1.0) == 0.75
    assert latency.overlap(4.0, 0.0) == 1.0
    assert latency.overlap(4.0, 9.0) == 0.0
    assert latency.overlap(0.0, 1.0) == 0.0
