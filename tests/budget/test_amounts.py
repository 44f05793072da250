"""Amounts of memory: what is written, what is meant, what is said back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.budget import amounts as budget
from blockstream.errors import ConfigError
from blockstream.system.limits import Headroom, Limit
from blockstream.system.memory import Held

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3.3GiB", 3543348019),
        ("3.3 GiB", 3543348019),
        (" 3.3GiB ", 3543348019),
        ("3.3GB", 3_300_000_000),
        ("512MiB", 512 << 20),
        ("512 MB", 512_000_000),
        ("1.5KiB", 1536),
        ("1kB", 1000),
        ("1KB", 1000),
        ("2TiB", 2 << 40),
        ("2TB", 2 * 10**12),
        ("17B", 17),
        ("17", 17),
        (17, 17),
    ],
)
def test_an_amount_is_exact_and_rounded_down(text, nbytes):
    assert budget.parse_nbytes(text) == nbytes


def test_a_long_decimal_keeps_every_digit_a_float_would_lose():
    assert budget.parse_nbytes("9007199254740993.0 B") == 9007199254740993
    assert budget.parse_nbytes("0.0000000010000000001GB") == 1


def test_a_percentage_is_what_is_held_plus_that_part_of_the_headroom():
    assert budget.parse_nbytes("80%", headroom_nbytes=1000, held_nbytes=300) == 1100
    assert budget.parse_nbytes("12.5 %", headroom_nbytes=1000) == 125
    assert budget.parse_nbytes("100%", headroom_nbytes=7, held_nbytes=1) == 8


def test_auto_is_eighty_percent():
    assert budget.parse_nbytes("auto", 1000, 300) == budget.parse_nbytes("80%", 1000, 300)


def test_a_percentage_alone_measures_this_process_and_machine(monkeypatch):
    monkeypatch.setattr(budget, "headroom", lambda: Headroom((Limit("made up", 5000, 4000),)))
    monkeypatch.setattr(budget, "held", lambda: Held(70, 70))
    assert budget.parse_nbytes("50%") == 570


NO_AMOUNTS = ["GiB", "-1GiB", "+1GiB", "1e9", "1_000", "1,5GiB", "0x10", "inf", "nan", "3.GiB", ".5GiB"]
NO_AMOUNTS += ["1GiB2", "%80", "١GiB", "automatic", "1" * 41]


@pytest.mark.parametrize("value", [*NO_AMOUNTS, "", "1  GiB", "1 %x", True, 1.5, None, b"1GiB", [1]])
def test_what_is_no_amount_is_refused_with_the_accepted_forms(value):
    with pytest.raises(ConfigError, match="percentage of the headroom") as refused:
        budget.parse_nbytes(value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "meant"), [("3gb", "3GB"), ("4Gi", "4GiB"), ("5mib", "5MiB"), ("6G", "6GB"), ("7kb", "7KB")]
)
def test_a_near_unit_is_suggested(text, meant):
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {meant}?")):
        budget.parse_nbytes(text)


def test_an_unknown_unit_is_named_and_a_fraction_of_no_unit_is_refused():
    with pytest.raises(ConfigError, match="no unit 'parsec'"):
        budget.parse_nbytes("3parsec")
    with pytest.raises(ConfigError, match=r"'3\.3' has no unit"):
        budget.parse_nbytes("3.3")


@pytest.mark.parametrize("value", [0, "0", "0GiB", "0.1B", -5, 2**63, "9000000TiB"])
def test_nothing_at_all_and_more_than_any_machine_has_are_refused(value):
    with pytest.raises(ConfigError, match="above 0 and below 8 EiB"):
        budget.parse_nbytes(value)


@pytest.mark.parametrize("value", ["0%", "101%", "100.0001%"])
def test_a_percentage_outside_its_range_is_refused(value):
    with pytest.raises(ConfigError, match="above 0 and at most 100"):
        budget.parse_nbytes(value, 1000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (736 << 20, "736 MiB"),
        (5 << 20, "5.0 MiB"),
        (GIB - 1, "1.0 GiB"),
        (2 * GIB, "2.0 GiB"),
        (3543348019, "3.3 GiB"),
        (-GIB, "-1.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_an_amount_reads_well(nbytes, text):
    assert budget.format_nbytes(nbytes) == text


@given(st.integers(1, 2**62))
def test_an_amount_rounded_up_is_enough_when_typed_back_and_at_most_one_percent_more(nbytes):
    typed = budget.parse_nbytes(budget.format_nbytes(nbytes, up=True))
    assert nbytes <= typed
    if nbytes >= 100 << 20:
        assert typed <= nbytes * 1.01


@given(st.integers(1, 2**62))
def test_an_amount_for_people_is_within_five_percent(nbytes):
    assert budget.parse_nbytes(budget.format_nbytes(nbytes)) == pytest.approx(nbytes, rel=0.05)


def test_no_budget_means_eighty_percent_of_the_headroom_above_what_is_held(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: Held(300, 300))
    got = budget.resolve_budget(None, Headroom((Limit("made up", 5000, 4000),)))
    assert (got.nbytes, got.explicit, got.warning, got.held_nbytes) == (1100, False, None, 300)
    assert budget.resolve_budget("auto", got.headroom) == got


def test_an_amount_above_the_headroom_is_kept_and_warned_about(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: Held(300, 300))
    room = Headroom((Limit("cgroup v2 memory.max of /job", 5000, 4000),))
    assert budget.resolve_budget("1300", room).warning is None
    got = budget.resolve_budget("1301", room)
    assert got.nbytes == 1301
    assert got.explicit
    assert "cgroup v2 memory.max of /job" in got.warning


@pytest.mark.parametrize(("value", "explicit"), [("50%", False), (" auto ", False), (5, True), ("5B", True)])
def test_only_an_amount_is_explicit(value, explicit):
    room = Headroom((Limit("made up", 5000, 4000),))
    assert budget.resolve_budget(value, room).explicit is explicit
