"""Facts measured on this machine: kept apart by what they depend on, refreshed, never in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blockstream.checkpoint.read.entries import FileStamp
from blockstream.system import calibration

STAMP = FileStamp(Path("/models/a.safetensors"), 1000, 1, 0, 8, "ab" * 32)
ABOUT = calibration.execute_costs_of([STAMP], "F32", 2, "float32[1, 4]")


def test_what_is_written_is_read_again(tmp_path):
    calibration.write(ABOUT, {"block.0": 0.5, "block.1": 0.25}, tmp_path)
    assert calibration.read(ABOUT, tmp_path) == {"block.0": 0.5, "block.1": 0.25}


def test_a_later_run_refreshes_what_it_saw_and_leaves_the_rest(tmp_path):
    calibration.write(ABOUT, {"block.0": 0.5, "block.1": 0.25}, tmp_path)
    calibration.write(ABOUT, {"block.1": 0.75}, tmp_path)
    assert calibration.read(ABOUT, tmp_path) == {"block.0": 0.5, "block.1": 0.75}


@pytest.mark.parametrize(
    "other",
    [
        calibration.execute_costs_of([STAMP], "BF16", 2, "float32[1, 4]"),
        calibration.execute_costs_of([STAMP], "F32", 1, "float32[1, 4]"),
        calibration.execute_costs_of([STAMP], "F32", 2, "float32[1, 8]"),
        calibration.execute_costs_of(
            [FileStamp(STAMP.path, 1000, 1, 0, 8, "cd" * 32)], "F32", 2, "float32[1, 4]"
        ),
        {**ABOUT, "machine": "another"},
    ],
    ids=["dtype", "threads", "shapes", "checkpoint", "machine"],
)
def test_execution_depends_on_dtype_threads_shapes_checkpoint_and_machine(tmp_path, other):
    calibration.write(ABOUT, {"block.0": 0.5}, tmp_path)
    assert calibration.read(other, tmp_path) == {}


def test_a_copy_of_a_checkpoint_costs_the_same():
    copy = FileStamp(Path("/elsewhere/b.safetensors"), 1000, 99, 0, 8, "ab" * 32)
    assert calibration.execute_costs_of([copy], "F32", 2, "float32[1, 4]") == ABOUT


def test_loads_do_not_depend_on_shapes_or_threads():
    assert set(calibration.load_costs_of([STAMP], "F32")) == {"fact", "machine", "disk", "files", "dtype"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"schema": 2, "numbers": {"a": 1}}',
        b'{"schema": 1, "numbers": [1]}',
        b'{"schema": 1, "numbers": {"a": "x"}}',
        b'{"schema": 1, "numbers": {"a": null}}',
    ],
)
def test_a_broken_file_is_as_good_as_none_and_is_replaced(tmp_path, text):
    calibration.write(ABOUT, {"a": 1.0}, tmp_path)
    (file,) = (tmp_path / "calibration").iterdir()
    file.write_bytes(text)
    assert calibration.read(ABOUT, tmp_path) == {}
    calibration.write(ABOUT, {"a": 2.0}, tmp_path)
    assert calibration.read(ABOUT, tmp_path) == {"a": 2.0}


def test_numbers_that_are_no_seconds_are_left_out(tmp_path):
    calibration.write(ABOUT, {"a": float("nan"), "b": -1.0, "c": float("inf"), "d": 1.0}, tmp_path)
    assert calibration.read(ABOUT, tmp_path) == {"d": 1.0}


def test_nothing_measured_writes_nothing(tmp_path):
    calibration.write(ABOUT, {}, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_cache_that_refuses_is_done_without(tmp_path):
    (tmp_path / "calibration").write_text("a file where the folder would be")
    calibration.write(ABOUT, {"a": 1.0}, tmp_path)
    assert calibration.read(ABOUT, tmp_path) == {}


def test_a_write_leaves_no_draft_behind(tmp_path):
    calibration.write(ABOUT, {"a": 1.0}, tmp_path)
    (name,) = os.listdir(tmp_path / "calibration")
    assert name.endswith(".json") and not name.startswith(".")


def test_what_was_measured_in_the_state_most_like_this_one_is_believed(tmp_path):
    for load, value in ((0.0, 1.0), (0.6, 2.0), (0.05, 1.1), (0.62, 2.1)):
        calibration.write(ABOUT, {"a": value}, tmp_path, load=load)
    assert calibration.believed(ABOUT, 0.0, tmp_path).numbers == {"a": 1.1}
    assert calibration.believed(ABOUT, 0.7, tmp_path).numbers == {"a": 2.1}


def test_measurements_that_disagree_by_more_than_half_give_way_to_the_one_in_the_middle(tmp_path):
    for value in (1.0, 1.1, 9.0):
        calibration.write(ABOUT, {"a": value}, tmp_path)
    assert calibration.believed(ABOUT, 0.0, tmp_path).numbers == {"a": 1.1}


def test_a_measurement_is_believed_for_some_months(tmp_path, monkeypatch):
    calibration.write(ABOUT, {"a": 1.0}, tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400 * (calibration.BELIEVED_DAYS + 1))
    assert calibration.believed(ABOUT, 0.0, tmp_path) is None


def test_the_newest_measurements_are_kept(tmp_path):
    for n in range(calibration.MOST_KEPT + 3):
        calibration.write(ABOUT, {"a": float(n)}, tmp_path)
    kept = calibration.measurements(ABOUT, tmp_path)
    assert [one.numbers["a"] for one in kept] == [3.0, 4.0, 5.0, 6.0, 7.0]
