"""What a forward takes, added up from its operations."""

from __future__ import annotations

import pytest

from blockstream.plan.operations import CALL_S, MODULE_S, Op, Work, filled

PRODUCT = Op("a", "product", 2e9, 1e6, "float32")
MOVE = Op("b", "memory", 0.0, 1e6, "float32")


def test_a_module_takes_what_it_and_its_children_do_and_a_call_of_each():
    work = Work((PRODUCT, MOVE), {"x.0": {0: 6.0}, "x": {1: 1.0}}, {"": 1, "x": 1, "x.0": 2})
    seconds = work.seconds([1.0, 0.5])
    assert seconds["x.0"] == pytest.approx(3 * (1 + CALL_S) + MODULE_S)
    assert seconds["x"] == pytest.approx(6.5 + 7 * CALL_S + 3 * MODULE_S)
    assert seconds[""] == pytest.approx(seconds["x"] + MODULE_S)
    assert work.counts() == [6.0, 1.0]


def test_what_was_not_measured_takes_what_its_like_did():
    other = PRODUCT._replace(spec="c", flops=4e9)
    half = PRODUCT._replace(spec="d", dtype="bfloat16")
    ops, guessed = (PRODUCT, other, half, MOVE), [1.0, 2.0, 1.0, 5.0]
    assert filled(ops, {0: 3.0}, guessed) == [3.0, 6.0, 3.0, 5.0]
    assert filled(ops, {0: 3.0, 2: 0.5}, guessed)[1] == 6.0
    assert filled(ops, {}, guessed) == guessed
