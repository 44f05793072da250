"""Lines for programs: what is known, for as long as somebody reads."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from blockstream.plan.segments import AtMost, Segment, Stage, Unknown
from blockstream.report.feed import Feed
from blockstream.report.progress import Progress

DIT = Stage("dit", tuple(Segment(name, 100) for name in "abcd"), passes=AtMost(10))


@pytest.fixture
def progress():
    now = iter(range(100, 10_000, 9))
    quiet = Console(file=io.StringIO())
    with Progress(quiet, lambda: next(now), held_nbytes=lambda: 512) as progress:
        yield progress


def test_what_is_not_known_is_none(progress):
    found = progress.facts()
    assert (found["stage"], found["pass"], found["left_s"], found["budget_nbytes"]) == (None,) * 4
    assert (found["held_nbytes"], found["predicted_s"]) == (512, {})


def test_a_stage_in_progress_is_told_in_numbers(progress):
    progress.run_started(SimpleNamespace(budget_nbytes=1 << 30, predicted_s={"dit": 5.0, "vae": 7.0}))
    progress.stage_started(DIT)
    progress.pass_started(DIT, 5)
    found = progress.facts()
    assert (found["stage"], found["pass"], found["passes"], found["part"]) == ("dit", 6, 10, 0.5)
    assert found["left_s"] == 9 + 7.0  # half took nine seconds, and the VAE is to take seven
    assert (found["budget_nbytes"], found["predicted_s"]) == (1 << 30, {"dit": 5.0, "vae": 7.0})


def test_a_stage_without_a_known_end_has_no_part(progress):
    progress.stage_started(Stage("generate", DIT.segments, passes=Unknown()))
    found = progress.facts()
    assert (found["pass"], found["passes"], found["part"], found["left_s"]) == (1, None, None, None)


def test_lines_come_until_the_run_ends(progress):
    out = io.StringIO()
    with Feed(progress, out, every_s=0.001):
        while out.getvalue().count("\n") < 3:
            time.sleep(0.001)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert all(line["held_nbytes"] == 512 for line in lines)
    assert [line["at_s"] for line in lines] == sorted(line["at_s"] for line in lines)


def test_the_run_is_interrupted_when_nobody_reads_any_more(progress):
    reader, writer = os.pipe()
    os.close(reader)
    out = open(writer, "w")  # noqa: SIM115 (closing it flushes what nobody reads)
    with pytest.raises(KeyboardInterrupt), Feed(progress, out, every_s=0.001):
        for _ in range(6000):
            time.sleep(0.01)
    with suppress(BrokenPipeError):
        out.close()
    assert not [t for t in threading.enumerate() if t.name == "feed"]
