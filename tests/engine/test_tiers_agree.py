"""The simulator of both tiers and their engines give the same timeline, event for event."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.plan import latency
from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import NONE, POLICIES, PREFIX, SPREAD
from blockstream.plan.segments import Exactly, Schedule
from blockstream.plan.simulate_tiers import predict_tiers, simulate_tiers
from blockstream.plan.tiers import device_schedule, host_schedule, make_tiers
from tests.support.examples import examples
from tests.support.fakes import UNIT, schedule, stage
from tests.support.strategies import stages, whole
from tests.support.virtual_towers import run_towers


def copied(one, copies):
    """Return a stage whose segments take so long over the link."""
    segments = (
        replace(s, copied_nbytes=s.nbytes, copy_s=c) for s, c in zip(one.segments, copies, strict=True)
    )
    return replace(one, segments=tuple(segments))


def tiers_of(own, more=(0, 0), policies=(SPREAD,), lookahead=None):
    above = device_schedule(own, frozenset())
    least = least_arena(above)
    nothing = make_plan(above, least, [NONE])
    rooms = least + more[0], least_arena(host_schedule(own, nothing)) + more[1]
    return make_tiers(own, rooms, policies, lookahead=lookahead)


def assert_agree(tiers):
    events = simulate_tiers(tiers.device, tiers.host)
    ran, issued = run_towers(tiers)
    # What begins once all visits were issued is cut off by the end of the run.
    assert sorted(e for e in ran if e.start_s < issued) == sorted(e for e in events if e.start_s < issued)
    executed = [[e for e in x if e.kind == "execute"] for x in (ran, events)]
    assert executed[0] == executed[1]


@pytest.mark.parametrize("more", [(0, 0), (0, 16), (2, 2), (16, 0)])
@pytest.mark.parametrize(("load", "copy", "execute"), [(4, 1, 2), (2, 3, 1), (1, 1, 3)])
def test_one_stage_runs_as_simulated(more, load, copy, execute):
    one = copied(stage(sizes=(1,) * 6, load=load, execute=execute, passes=4), [copy] * 6)
    assert_agree(tiers_of(schedule(one), tuple(n * UNIT for n in more)))


def steady_s(tiers):
    """Return how long a pass takes between the second but last and the last."""
    last = [e.end_s for e in simulate_tiers(tiers.device, tiers.host) if e.kind == "execute"]
    b = len(tiers.device.schedule.stages[0].order)
    return last[-b - 1] - last[-2 * b - 1]


@pytest.mark.parametrize(("load", "copy", "execute"), [(4, 1, 2), (2, 3, 1), (1, 1, 3), (5, 3, 2)])
def test_a_steady_pass_without_retention_is_eq_8_of_both_tiers(load, copy, execute):
    one = copied(stage(sizes=(1,) * 6, load=load, execute=execute, passes=6), [copy] * 6)
    through = tiers_of(schedule(one), policies=[NONE])
    assert steady_s(through) == latency.tiers_dynamic_s(6, 0, 0, load, copy, execute)
    in_memory = tiers_of(schedule(one), (0, 16 * UNIT), policies=[NONE, PREFIX])
    assert len(in_memory.host.stages[0].retained) == 6
    assert steady_s(in_memory) == latency.tiers_dynamic_s(6, 0, 6, load, copy, execute)


@pytest.mark.parametrize("policy", [PREFIX, SPREAD])
@pytest.mark.parametrize("more", [(2, 2), (0, 3), (3, 0), (1, 4)])
def test_a_steady_pass_lies_between_eq_9_of_both_tiers_and_its_bound(policy, more):
    one = copied(stage(sizes=(1,) * 8, load=5, execute=2, passes=8), [3] * 8)
    made = tiers_of(schedule(one), tuple(n * UNIT for n in more), [policy], lookahead=None)
    d, h = (len(x.stages[0].retained) for x in (made.device, made.host))
    assert latency.tiers_bound_s(8, d, h, 5, 3, 2) <= steady_s(made)
    if policy is PREFIX:
        assert steady_s(made) <= latency.tiers_dynamic_s(8, d, h, 5, 3, 2)


def test_a_prediction_of_many_passes_goes_on_as_the_first_ones():
    one = copied(stage(sizes=(1,) * 6, load=4, execute=1, passes=500), [2] * 6)
    made = tiers_of(schedule(one), (UNIT, 2 * UNIT))
    shown = predict_tiers(made.device, made.host).stages[0]
    assert shown == made.device.predicted.stages[0]
    assert shown.execute_s == 3000 and shown.copied_nbytes % UNIT == 0
    assert shown.wall_s == shown.execute_s + shown.stall_s
    assert shown.copy_s == 2 * shown.copied_nbytes / UNIT and shown.load_s == 4 * shown.read_nbytes / UNIT


@st.composite
def tiers(draw):
    names = draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    drawn = []
    for name in names:
        # Nothing that is read for nobody: whether it is begun at the moment it is dropped has no order.
        drawn_one = draw(stages(name))
        order, passes = tuple(range(len(drawn_one.segments))), Exactly(drawn_one.passes.expected)
        one = replace(drawn_one, order=order, passes=passes, once=frozenset())
        drawn.append(copied(one, [draw(whole) for _ in one.segments]))
    more = draw(st.tuples(st.integers(0, 8), st.integers(0, 12)))
    policies = draw(st.sampled_from([[NONE], [PREFIX], [SPREAD], list(POLICIES)]))
    lookahead = draw(st.sampled_from([None, None, 1, 2]))
    return tiers_of(Schedule(tuple(drawn)), tuple(n * UNIT for n in more), policies, lookahead)


@given(tiers())
@examples(60)
def test_any_plan_of_both_tiers_runs_as_simulated(drawn):
    assert_agree(drawn)
