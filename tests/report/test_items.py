"""A run is its set-up, its stages and the rest: the same items are predicted and measured."""

from __future__ import annotations

import pytest

from blockstream.report.facts import stage_table
from blockstream.report.items import REST, SETUP, beside_stages, measured_items, predicted_items

STAGES = [
    {"name": "t5", "begin_s": 3.0, "wall_s": 1.0, "predicted_s": 0.9},
    {"name": "dit", "begin_s": 4.1, "wall_s": 10.0, "predicted_s": 9.0},
]


def test_the_items_measured_are_those_predicted_and_add_up_to_the_run():
    predicted = predicted_items(2.5, {"t5": 1.0, "dit": 20.0}, 0.5)
    found = measured_items(predicted, STAGES, 15.0)
    assert [x["name"] for x in found] == [SETUP, "t5", "dit", REST] == [x["name"] for x in predicted]
    assert [x["measured_s"] for x in found] == [3.0, 1.0, 10.0, pytest.approx(1.0)]
    assert sum(x["measured_s"] for x in found) == pytest.approx(15.0)
    assert [x["predicted_s"] for x in found] == [2.5, 0.9, 9.0, 0.5], "for the passes that ran"


def test_a_run_without_a_stage_is_all_set_up():
    assert measured_items(predicted_items(1.0, {}, 0.5), [], 2.0)[0]["measured_s"] == 2.0


def test_what_is_no_stage_stands_in_the_table_of_stages():
    items = measured_items(predicted_items(2.5, {"t5": 1.0, "dit": 20.0}, 0.5), STAGES, 15.0)
    rows = stage_table({"stages": STAGES, "items": items})
    assert [row[0] for row in rows] == ["stage", SETUP, "t5", "dit", REST, "in all"]
    assert rows[1][5:8] == ["2.50 s", "3.00 s", "+20%"]
    assert beside_stages({}, "predicted_s") == {}
    assert beside_stages({"items": ["x", {"name": SETUP}]}, "predicted_s") == {}
