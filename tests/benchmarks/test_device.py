"""The device's benchmark on the fake device: parts find the same bits, and goals say what they saw."""

from __future__ import annotations

import pytest

from benchmarks.device import parts, tiles
from benchmarks.device.goals import page, verdicts


@pytest.fixture(name="at")
def _at(tmp_path):
    return parts.Context(tmp_path, fake=True, seconds=60)


def test_parts_find_the_bits_of_the_resident_network_and_goals_are_judged(at):
    found = {"make": parts.make(at), "link": parts.link(at), "resident": parts.resident(at)}
    found |= {name: getattr(parts, name)(at) for name in ("pinned", "half", "disk", "settled")}
    for name in ("pinned", "half", "disk"):
        assert all(row["same_bits"] for n, row in found[name].items() if n.isdigit())
        assert found[name]["device"]["budget"]["held"]
    assert found["half"]["retained"] > found["pinned"]["retained"]
    assert found["settled"]["hooks_gone"] and found["settled"]["same_bits"]
    lines = verdicts(found)
    assert any(line.startswith(("reached: everything", "NOT reached: everything")) for line in lines)
    assert "NOT seen: set-up (KeyError: 'setup')" in lines
    made = {"regenerate": "x", "date": "2026-01-01", "commit": "c", "versions": "v"}
    assert "| pinned |" in page(made, found)


def test_a_goal_is_judged_by_the_largest_of_compute_link_and_disk():
    row = {"s": 2.0, "copied_nbytes_a_pass": 8e9}
    found = {
        "link": {"registered_bytes_per_s": 50e9, "disk_bytes_per_s": 2e9},
        "resident": {"1024": {"s": 0.1}},
        "pinned": {"1024": row},
        "disk": {"1024": {**row, "s": 4.0}, "device": {"host": {"retained_nbytes": 2e9}}},
    }
    lines = "\n".join(verdicts(found))
    assert "NOT reached: pinned, 1k tokens: 2.000 s, bound 0.160 s" in lines
    assert "NOT reached: from disk, 1k tokens: 4.000 s, bound 3.000 s: 0.750" in lines


def test_sliding_tiles_are_timed_by_window(at):
    found = tiles.tiles(at)
    assert set(found) == {"3x3x3", "5x3x3", "1x6x10"}
    assert found["1x6x10"]["density"] == 0.5 and found["1x6x10"]["gathered"]["s"] > 0
