"""A plan with another order is adopted between passes: the first pass corrects a guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.plan.planner import make_plan
from blockstream.plan.retention import NONE, PREFIX, SPREAD
from blockstream.plan.segments import AtMost, Unknown
from tests.support.examples import examples
from tests.support.fakes import UNIT, engine_on, schedule, stage

GUESS = (0, 1, 2, 3, 4, 5)
ZIPPED = (0, 3, 1, 4, 2, 5)


def planned(order, policy=SPREAD, units=5, passes=4):
    return make_plan(schedule(stage(sizes=(1,) * 6, passes=passes, order=order)), units * UNIT, [policy])


def run_pass(engine, order):
    at = engine.begin_pass("s")
    for i in order:
        with engine.visit("s", f"s.{i}") as handle:
            assert handle.name == f"s.{i}"
            assert not handle.released
    engine.end_pass("s", at)


@pytest.mark.parametrize("policy", [NONE, PREFIX, SPREAD], ids=lambda p: p.name)
@pytest.mark.parametrize("units", [2, 3, 4, 6])
def test_every_segment_is_let_go_after_another_order_was_adopted(policy, units):
    with engine_on(planned(GUESS, policy, units)) as (engine, _):
        run_pass(engine, ZIPPED)
        engine.adopt(planned(ZIPPED, policy, units))
        for _ in range(3):
            run_pass(engine, ZIPPED)
        assert engine.unplanned <= len(GUESS)  # all in the pass that was guessed


def test_a_retained_segment_is_not_read_again_when_only_the_order_changes():
    guess, zipped = planned(GUESS), planned(ZIPPED)
    same = {
        guess.schedule.stages[0].segments[i].name
        for i, at in guess.stages[0].layout.retained.items()
        if zipped.stages[0].layout.retained.get(i) == at
    }
    assert same, "the example retains something at the same place under both orders"
    with engine_on(guess) as (engine, store):
        run_pass(engine, ZIPPED)
        engine.adopt(zipped)
        for _ in range(3):
            run_pass(engine, ZIPPED)
        assert [n for n in store.loads if n in same] == list(
            dict.fromkeys(n for n in store.loads if n in same)
        )


def test_a_shorter_order_is_adopted():
    with engine_on(planned(GUESS)) as (engine, _):
        run_pass(engine, (3, 4))
        engine.adopt(planned((3, 4)))
        before = engine.unplanned
        for _ in range(2):
            run_pass(engine, (3, 4))
        assert engine.unplanned == before
        run_pass(engine, GUESS)  # the others are loaded on demand


@examples(60)
@given(
    st.lists(st.permutations(GUESS), min_size=1, max_size=3),
    st.sampled_from([NONE, PREFIX, SPREAD]),
    st.integers(2, 7),
    st.sampled_from([8, AtMost(9), Unknown(3)]),
)
def test_any_orders_adopted_one_after_another_leave_nothing_behind(orders, policy, units, passes):
    with engine_on(planned(GUESS, policy, units, passes)) as (engine, _):
        for order in orders:
            run_pass(engine, order)
            engine.adopt(planned(tuple(order), policy, units, passes))
            run_pass(engine, order)
