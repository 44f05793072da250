"""`run` and `plan` hand a validated config to the runner and print what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPORT = {
    "schema": 1,
    "budget": {"nbytes": 2 << 30, "peak_nbytes": 1 << 30, "held": True, "by_cause": {}},
    "stages": [
        {
            "name": "dit [bold]",
            "passes": 3,
            "b": 28,
            "d": 7,
            "overlap": 0.925,
            "stall_s": 1.5,
            "wall_s": 12.25,
            "predicted_s": 11.5,
            "read_nbytes": 5 << 20,
        }
    ],
}
PLAN = {
    "schema": 1,
    "stages": [{"name": "dit", "retained": [0, 4], "slots": 3, "predicted_s": 9.5, "stall_s": None}],
    "peak_nbytes": 1 << 30,
    "curve": [{"budget_nbytes": 1 << 30, "predicted_s": 9.5}],
}


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_run_hands_the_validated_config_to_the_runner(command, site, runner, tmp_path):
    runner.result = REPORT
    argv = ["run", "video.yaml", "--set", "steps=5", "--set", "sampler=video:leap", "--out", "out"]
    code, _, err = command(*argv, "--overwrite")
    assert code == 0
    ((name, (config, folder), options),) = runner.calls
    assert (name, folder) == ("run", Path("out"))
    assert (config.pipeline.options.steps, config.sampler.ref) == (5, "video:leap")
    assert (options["resume"], options["overwrite"]) == (False, True)
    assert err == "video.yaml: the example packaged in video-package 2.0\n"


def test_run_prints_predicted_against_measured_and_the_peak(command, site, runner):
    runner.result = REPORT
    _, out, _ = command("run", "video.yaml")
    assert words(out) == [
        ["stage", "passes", "retained", "read", "predicted", "measured", "stalled", "overlap"],
        ["dit", "[bold]", "3", "7", "of", "28", "5.0", "MiB", "11.50", "s", "12.25", "s", "1.50", "s", "92%"],
        ["memory:", "peak", "1.0", "GiB", "of", "a", "budget", "of", "2.0", "GiB,", "held"],
    ]


@pytest.mark.parametrize("argv", [("run", "video.yaml"), ("plan", "video.yaml")])
def test_json_is_all_that_goes_to_stdout(command, site, runner, argv):
    runner.result = {"name": "für"}
    _, out, _ = command(*argv, "--json")
    assert json.loads(out) == {"name": "für"}


def test_resume_takes_the_config_of_the_folder_unless_one_is_named(command, site, runner, tmp_path):
    runner.result = REPORT
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("pipeline: video\nsteps: 9\n")
    assert command("run", "--resume", "out")[0] == 0
    assert command("run", "video.yaml", "--resume", "out")[0] == 0
    (_, (own, folder), options), (_, (named, _), _) = runner.calls
    assert (own.pipeline.options.steps, named.pipeline.options.steps) == (9, 3)
    assert (folder, options["resume"]) == (Path("out"), True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "nowhere"], "nowhere/config.yaml does not exist"),
        (["--resume", "out", "--overwrite"], "choose one"),
        (["video.yaml", "--set", "stpes=3"], "--set stpes: unknown key; did you mean 'steps'?"),
        (["video.yaml", "--set", "stpes"], "write it as key=value"),
        (["nothing.yaml"], "nothing.yaml does not exist"),
    ],
)
def test_a_config_that_cannot_be_used_never_reaches_the_runner(command, site, runner, argv, message):
    code, out, err = command("run", *argv)
    assert (code, out, runner.calls) == (2, "", [])
    assert message in err


def test_the_progress_of_a_run_ends_with_it_and_is_silent_off_a_terminal(command, site, runner):
    runner.result = RuntimeError("in the middle")
    code, out, err = command("run", "video.yaml")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 2
    ((_, _, options),) = runner.calls
    (progress,) = options["observers"]
    assert progress._live is None


def test_plan_prints_what_stays_the_times_the_peak_and_the_curve(command, site, runner):
    runner.result = PLAN
    code, out, _ = command("plan", "video.yaml", "--set", "steps=4")
    assert code == 0
    assert runner.calls[0][1][0].pipeline.options.steps == 4
    assert words(out) == [
        ["stage", "retained", "slots", "predicted", "stalled"],
        ["dit", "2", "3", "9.50", "s", "-"],
        ["predicted:", "9.5", "s", "in", "all,", "peak", "1.0", "GiB"],
        ["budget", "predicted"],
        ["1.0", "GiB", "9.50", "s"],
    ]
