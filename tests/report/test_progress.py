"""The live line: what it says, when it says nothing."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from blockstream.engine.spans import Span
from blockstream.plan.segments import AtMost, Exactly, Segment, Stage, Unknown
from blockstream.plugins import Plugins
from blockstream.report.progress import Progress, duration

SEGMENTS = tuple(Segment(name, 100) for name in "abcd")
DIT = Stage("dit", SEGMENTS, passes=AtMost(10))
RUN = SimpleNamespace(budget_nbytes=1 << 30, predicted_s={"t5": 5.0, "dit": 50.0, "vae": 8.0})


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    quiet = Console(file=io.StringIO())
    with Progress(quiet, clock, held_nbytes=lambda: 512 << 20) as progress:
        yield progress


def load(progress, nbytes: int) -> None:
    progress.segment_loaded(Span("loader", "load", 0.0, 1.0, "a", nbytes=nbytes))


def execute(progress, count: int) -> None:
    for _ in range(count):
        progress.segment_executed(Span("compute", "execute", 0.0, 1.0, "a"))


def test_the_line_tells_stage_pass_part_time_left_speed_and_memory(progress, clock):
    progress.run_started(RUN)
    progress.stage_started(DIT)
    progress.pass_started(DIT, 4)
    execute(progress, 2)
    clock.now += 9.0
    load(progress, 3_000_000_000)
    # 45% done in 9 s leaves 11 s, and the VAE is predicted to take 8.
    assert progress.text() == "dit  pass 5 of 10  45%  0:19 left  0.60 GB/s  512 MiB of 1.0 GiB"


def test_the_speed_is_that_of_the_last_seconds(progress, clock):
    progress.stage_started(DIT)
    load(progress, 10_000_000_000)
    clock.now += 6.0
    load(progress, 5_000_000_000)
    assert "1.00 GB/s" in progress.text()
    clock.now += 6.0
    assert "0.00 GB/s" in progress.text()


def test_a_stage_without_a_known_end_promises_no_time(progress, clock):
    stage = Stage("generate", SEGMENTS, passes=Unknown())
    progress.stage_started(stage)
    progress.pass_started(stage, 6)
    clock.now += 10
    assert progress.text() == "generate  pass 7  0.00 GB/s  512 MiB"


def test_more_visits_than_planned_do_not_pass_the_end_of_the_pass(progress, clock):
    stage = Stage("t5", SEGMENTS, passes=Exactly(1))
    progress.stage_started(stage)
    execute(progress, 9)
    clock.now += 10
    assert "100%" in progress.text() and "left" not in progress.text()


def test_a_young_run_and_the_time_between_stages_say_nothing(progress, clock):
    progress.stage_started(DIT)
    clock.now += 1.9
    assert progress.text() == ""
    clock.now += 0.2
    assert progress.text() != ""
    progress.stage_finished(DIT)
    assert progress.text() == ""


def test_off_a_terminal_nothing_is_written(clock):
    file = io.StringIO()
    with Progress(Console(file=file), clock) as progress:
        progress.stage_started(DIT)
        clock.now += 60
    assert file.getvalue() == ""


def test_on_a_terminal_the_line_is_shown_and_taken_back_even_when_the_run_fails(clock):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with pytest.raises(RuntimeError), Progress(console, clock, lambda: 1) as progress:
        progress.stage_started(DIT)
        clock.now += 60
        progress.live.refresh()
        assert "dit  pass 1 of 10" in file.getvalue()
        raise RuntimeError
    assert re.search(r"\x1b\[\?25h", file.getvalue()), "the cursor stays hidden"
    assert progress.live is None


def test_it_is_an_observer_like_any_plugin(progress, clock):
    plugins = Plugins()
    plugins.register(progress, "progress")
    plugins.hook.run_started(run=RUN)
    plugins.hook.stage_started(stage=DIT)
    plugins.hook.pass_started(stage=DIT, pass_index=2)
    clock.now += 5
    assert progress.text().startswith("dit  pass 3 of 10  20%")


def test_times_are_written_for_people():
    assert [duration(s) for s in (7.4, 59.6, 754, 3723)] == ["0:07", "1:00", "12:34", "1:02:03"]
