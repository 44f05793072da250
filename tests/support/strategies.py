"""Stages and plans as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from blockstream.plan.planner import least_arena, make_plan
from blockstream.plan.retention import NONE, POLICIES, PREFIX, SPREAD
from blockstream.plan.segments import AtMost, Exactly, Schedule, Segment, Stage, Unknown
from tests.support.fakes import UNIT

whole = st.integers(1, 9).map(float)
segments = st.builds(lambda n, l, e: (n * UNIT, l, e), st.integers(1, 4), whole, whole)
passes = st.one_of(
    st.integers(1, 4).map(Exactly), st.integers(1, 4).map(AtMost), st.integers(1, 3).map(Unknown)
)


@st.composite
def stages(draw, name="s"):
    costs = draw(st.lists(segments, min_size=1, max_size=7))
    built = tuple(
        Segment(f"{name}.{i}", n, l, e, resident=draw(st.integers(0, 5)) == 0)
        for i, (n, l, e) in enumerate(costs)
    )
    order = tuple(range(len(built))) + tuple(draw(st.lists(st.integers(0, len(built) - 1), max_size=3)))
    once = draw(st.frozensets(st.integers(0, len(built) - 1), max_size=draw(st.sampled_from([0, 0, 3, 7]))))
    return Stage(name, built, order, draw(passes), once=once)


@st.composite
def plans(draw):
    one = Schedule(
        tuple(draw(stages(name)) for name in draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")])))
    )
    arena = least_arena(one) + draw(st.integers(0, 12)) * UNIT
    policies = draw(st.sampled_from([[NONE], [PREFIX], [SPREAD], list(POLICIES)]))
    return make_plan(one, arena, policies, lookahead=draw(st.sampled_from([None, None, 1, 2])))
