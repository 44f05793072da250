"""A plan in a sentence, an error in a line."""

from __future__ import annotations

from itertools import pairwise

import pytest
from blockstream_web.course import POINTS, Course
from blockstream_web.outlook_words import duration, sentence
from blockstream_web.process import error_in

from tests.support.fake_blockstream import PLAN


def test_a_plan_says_how_long_in_how_much_and_what_more_would_save():
    assert sentence(PLAN) == "This takes about 4 min 10 s in 3.2 GiB; +1.0 GiB saves 50 s."


def test_past_the_knee_it_says_what_is_still_to_gain():
    plan = {**PLAN, "peak_nbytes": 5000 << 20, "predicted_s": 200.0}
    assert sentence(plan) == "This takes about 3 min 20 s in 4.9 GiB; +2.9 GiB saves 10 s."


@pytest.mark.parametrize("change", [{"peak_nbytes": 8000 << 20}, {"predicted_s": 190.0}])
def test_where_nothing_is_to_gain_it_says_so(change):
    assert sentence({**PLAN, **change}).endswith("; more memory saves nothing.")


def test_times_are_written_for_people():
    found = [duration(s) for s in (0.44, 9.96, 59.6, 250, 3899.9)]
    assert found == ["0.4 s", "10 s", "1 min 0 s", "4 min 10 s", "1 h 5 min"]


def test_an_error_is_the_last_message_without_what_was_logged():
    said = "movd.yaml: the example\nWARNING: x\nblockstream: a has 2 problems:\n  line 1, b: no\n"
    assert error_in(said) == "a has 2 problems:\n  line 1, b: no"
    assert error_in("Killed\n") == "Killed"
    assert error_in("") == "it ended without a word"


def test_a_long_run_keeps_a_bounded_curve_from_its_beginning_to_now():
    course = Course("0001")
    for n in range(10 * POINTS):
        course.take({"at_s": n / 2, "held_nbytes": n})
    curve = course.public()["curve"]
    assert POINTS <= len(curve) < 2 * POINTS
    assert curve[0] == [0.0, 0] and curve[-1][0] > 0.99 * 5 * POINTS - 10
    assert len({b[0] - a[0] for a, b in pairwise(curve)}) == 1, "points lie evenly"
    assert course.take({"report": {}}) is None and course.take(3) is None
