"""What more memory buys: the curve falls, its marks are where they belong, its sentences are true."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstream.plan.layout import align_up
from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import POLICIES
from blockstream.report.curve import Point, advice, budget_curve, enough, knee, seconds, shown
from tests.support.fakes import UNIT, schedule, stage

MIB = 1 << 20


def points(*times: float) -> list[Point]:
    return [Point((k + 1) * MIB, t, 100 - k) for k, t in enumerate(times)]


stages = st.builds(
    stage,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    load=st.sampled_from([0.25, 1.0, 3.0]),
    execute=st.sampled_from([0.5, 1.0, 2.0]),
    passes=st.integers(1, 5),
)


@given(stages)
@settings(max_examples=40, deadline=None)
def test_the_curve_goes_from_the_least_to_all_resident_and_never_rises(one):
    made = schedule(one)
    found = budget_curve(made)
    assert found[0].arena_nbytes == least_arena(made)
    assert found[-1].arena_nbytes == sum(align_up(one.segments[i].nbytes) for i in one.visited)
    for a, b in pairwise(found):
        assert a.arena_nbytes < b.arena_nbytes
        assert a.predicted_s >= b.predicted_s


def test_each_point_is_what_the_planner_predicts_there():
    made = schedule(stage("dit", (1,) * 12, load=2.0, execute=1.0, passes=6))
    for point in budget_curve(made, also=[7 * UNIT]):
        plan = make_plan(made, point.arena_nbytes, POLICIES)
        assert plan.predicted.wall_s >= point.predicted_s - 1e-9
    assert 7 * UNIT in [p.arena_nbytes for p in budget_curve(made, also=[7 * UNIT])]


def test_points_that_tell_nothing_are_not_shown():
    flat = points(100, 99.99, 99.98, 99.97)
    assert shown(flat, lambda arena: 400 * MIB + arena) == [flat[0]], "4 MiB and 0.03% are nothing"
    bent = points(100, 60, 30, 20, 18, 16, 14)
    assert shown(bent, lambda arena: 400 * MIB + arena) == bent
    many = points(*(200 / (n + 1) for n in range(30)))
    found = shown(many, lambda arena: arena)
    assert len(found) == 8 and found[0] == many[0] and found[-1] == many[-1] and knee(many) in found


def test_the_knee_is_shown_however_near_it_is():
    near = points(100, 98.5, 98.4, 98.3)
    assert knee(near) in shown(near, lambda arena: 900 * MIB + arena)


def test_more_memory_pays_where_loads_are_longer_than_compute():
    found = budget_curve(schedule(stage("dit", (1,) * 12, load=2.0, execute=1.0, passes=10)))
    assert found[0].predicted_s > 1.5 * found[-1].predicted_s


def test_the_knee_is_where_the_curve_bends():
    bent = points(100, 60, 30, 20, 18, 16, 14)
    assert knee(bent) == bent[2]


def test_a_straight_fall_bends_where_it_turns_flat():
    assert knee(points(100, 80, 60, 40, 40, 40)) == points(100, 80, 60, 40)[3]


@pytest.mark.parametrize("flat", [points(5, 5, 5, 5), points(5)])
def test_a_flat_curve_has_no_knee_and_says_that_memory_buys_nothing(flat):
    assert knee(flat) is None
    assert enough(flat) == flat[0]
    assert advice(flat, lambda arena: arena) == [
        "1.0 MiB: 5.00 s, the least that works; more memory saves nothing"
    ]


def test_the_sentences_add_up():
    said = advice(points(100, 60, 30, 20, 18, 16, 14, 14, 14), lambda arena: arena + 9 * MIB)
    assert said == [
        "10 MiB: 100 s, the least that works",
        "+2.0 MiB saves 70.0 s (the knee)",
        "+4.0 MiB saves 16.0 s",
        "beyond 16 MiB nothing",
    ]


def test_the_least_is_one_number():
    said = advice(points(100, 60, 60), lambda arena: arena + 99 * MIB, least_nbytes=98 * MIB)
    assert said[0] == "98 MiB: 100 s, the least that works"


def test_times_are_written_for_people():
    assert [seconds(s) for s in (0.421, 12.34, 212.4, 3900)] == ["0.42 s", "12.3 s", "212 s", "1 h 05 min"]
