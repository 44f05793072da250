"""The device's benchmark on the fake device: parts find the same bits, and goals say what they saw."""

from __future__ import annotations

import pytest

from benchmarks.device import families, parts, tiles
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


@pytest.mark.parametrize("name", ["t5", "stdit", "vae", "llama"])
def test_a_network_of_a_family_streams_to_the_bits_of_the_plain_one(at, name):
    found = getattr(families, name)(at)
    for row in found.values() if name == "llama" else [found]:
        assert row["same"] and row["held"] and row["streamed"]["s"] > 0 and row["left_out"] == ["accelerate"]
    assert [p.name for p in at.folder.iterdir()] == []


def test_many_passes_and_a_device_under_load_give_the_same_bits(at):
    parts.make(at)
    soaked, loaded = families.soak(at), families.load(at)
    assert (soaked["passes"], soaked["wrong"], soaked["grown_nbytes"], soaked["unplanned"]) == (12, 0, 0, 0)
    assert soaked["held"] and loaded["same"] and loaded["said"] is None


def test_open_sora_is_run_from_prompt_to_video_within_both_budgets(at):
    found = families.opensora(at)
    assert [row["stages"]["dit"]["passes"] for row in found.values()] == [1, 1]
    assert all(row["host"]["held"] for row in found.values())


def test_sliding_tiles_are_timed_by_window(at):
    found = tiles.tiles(at)
    assert set(found) == {"3x3x3", "5x3x3", "1x6x10"}
    assert found["1x6x10"]["density"] == 0.5 and found["1x6x10"]["gathered"]["s"] > 0


def test_goals_of_families_say_bits_budgets_and_who_is_first():
    row = {
        "streamed": {"s": 1.0},
        "resident": {"s": 0.5},
        "accelerate": {"s": 2.0},
        "held": True,
        "same": True,
    }
    lines = "\n".join(verdicts({"t5": row, "stdit": {**row, "same": False}, "llama": {"1": row}}))
    assert "\nreached: T5-XXL in 8 GB and 12 GiB: 1.000 s, resident 0.500 s, accelerate 2.000 s" in lines
    assert "NOT reached: STDiT3-XL in 8 GB and 12 GiB" in lines and "OTHER bits" in lines
    assert (
        "reached: Llama 8B, 32 tokens, batch 1" in lines and "NOT seen: Llama 8B, 32 tokens, batch 4" in lines
    )
    soaked = {"passes": 120, "of": 200, "wrong": 0, "grown_nbytes": 0, "held": True}
    assert "NOT reached: 200 passes: 120 of 200 passes, 0 wrong" in "\n".join(verdicts({"soak": soaked}))
