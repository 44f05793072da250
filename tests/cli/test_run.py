"""`run` and `plan` hand a validated config to the runner and print what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPORT = {
    "schema": 1,
    "budget": {
        "nbytes": 2 << 30,
        "peak_nbytes": 1 << 30,
        "held": True,
        "by_cause": {"arena": 700 << 20, "runtime": 324 << 20, "other": 0},
        "peak_at_s": 3.5,
        "peak_during": "computing block.7",
    },
    "stages": [
        {
            "name": "dit [bold]",
            "passes": 18,
            "declared_passes": 30,
            "b": 28,
            "d": 7,
            "l_s": 0.5,
            "e_s": 0.25,
            "alpha_s": 0.125,
            "r_s": 6.5,
            "r8_s": 7.0,
            "r9_s": 8.75,
            "overlap": 0.925,
            "stall_s": 1.5,
            "wall_s": 12.25,
            "predicted_s": 11.5,
            "read_nbytes": 5 << 20,
        }
    ],
    "sampler": {"choice": {"name": "lpl"}, "passes": 18, "of": 30, "runs": [{"leaps": [[17, 30]]}]},
    "attention": {
        "merged_layers": 6,
        "merged_passes": 9,
        "plain_passes": 9,
        "merged_pass_s": 1.5,
        "plain_pass_s": 3.0,
    },
    "disk": {"read_nbytes": 5 << 20, "read_bytes_per_s": 1.2e9, "disk_bytes_per_s": 1.5e9},
}
PLAN = {
    "schema": 1,
    "budget": {"nbytes": 2 << 30, "arena_nbytes": None},
    "stages": [
        {
            "name": "dit",
            "passes": 30,
            "passes_are": "at most",
            "policy": "spread",
            "segments": 28,
            "nbytes": 1 << 30,
            "kinds": [{"name": "block.*", "count": 28, "nbytes": 28 << 20, "largest_nbytes": 1 << 20}],
            "retained": ["block.0", "block.4"],
            "why": {"block.0": "evenly spaced in compute time", "block.4": "evenly spaced in compute time"},
            "slots": 3,
            "predicted_s": 9.5,
            "execute_s": 9.0,
            "load_s": 8.0,
            "stall_s": 0.5,
            "read_nbytes": 5 << 30,
            "costs_from": "measured in earlier runs",
        }
    ],
    "predicted_s": 9.5,
    "stall_s": 0.5,
    "read_nbytes": 5 << 30,
    "peak_nbytes": 1 << 30,
    "by_cause": {"runtime": 300 << 20, "weights": 600 << 20, "activations": 124 << 20},
    "curve": [
        {"budget_nbytes": 900 << 20, "predicted_s": 19.0},
        {"budget_nbytes": 1 << 30, "predicted_s": 9.5},
        {"budget_nbytes": 2 << 30, "predicted_s": 9.0},
        {"budget_nbytes": 3 << 30, "predicted_s": 9.0},
        {"budget_nbytes": 4 << 30, "predicted_s": 9.0},
    ],
    "knee_nbytes": 1 << 30,
    "enough_nbytes": 2 << 30,
    "advice": ["900 MiB: 19.0 s, the least that works", "beyond 2.00 GiB nothing"],
    "read_a_year_nbytes": 15 << 50,
    "larger": [
        {"budget_nbytes": 2 << 30, "more_nbytes": 1 << 30, "saves_s": 0.5, "saves_read_nbytes": 4 << 30}
    ],
}


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


def test_run_prints_predicted_against_measured_the_equations_and_where_memory_went(command, site, runner):
    runner.result = REPORT
    _, out, _ = command("run", "video.yaml")
    assert [line.rstrip() for line in out.splitlines()] == [
        "stage         passes     read  predicted  measured  error  stalled  overlap",
        "dit [bold]  18 of 30  5.0 MiB     11.5 s    12.2 s    +7%   1.50 s      92%",
        "",
        "stage        b  d       l       e   l/e   alpha  r, Eq. 8  r, Eq. 9       r",
        "dit [bold]  28  7  0.50 s  0.25 s  2.00  0.12 s    7.00 s    8.75 s  6.50 s",
        "",
        "memory     peak 1.0 GiB of a budget of 2.0 GiB, held: 700 MiB arena, 324 MiB",
        "           runtime",
        "           at 3.50 s, computing block.7",
        "disk       read 5.0 MiB at 1.20 GB/s, 80% of the 1.50 GB/s this disk gives",
        "sampler    lpl: 18 of 30 steps computed, leapt 17 to 30",
        "attention  6 layers merge tokens, in 9 of 18 passes: a pass takes 1.50 s instead",
        "           of 3.00 s",
    ]


def test_a_budget_that_was_broken_is_shouted(command, site, runner):
    runner.result = {**REPORT, "budget": {"nbytes": 1, "peak_nbytes": 2, "held": False}}
    assert "memory     peak 2 B of a budget of 1 B, EXCEEDED" in command("run", "video.yaml")[1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["video.mp4"], "made     out/video.mp4"),
        (["0000/a.mp4", "0001/a.mp4", "0002/a.mp4"], "made     out/0000/a.mp4 to out/0002/a.mp4"),
    ],
)
def test_run_says_where_its_files_are(command, site, runner, tmp_path, files, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("pipeline: video\n")
    runner.result = {**REPORT, "output": {"files": files}}
    _, out, _ = command("run", "--resume", "out")
    assert out.splitlines()[-1] == said


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
        (["--resume", "nowhere"], "nowhere is no folder"),
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
    assert progress.live is None


def test_plan_prints_what_stays_and_why_the_times_the_peak_and_the_curve(command, site, runner):
    runner.result = PLAN
    code, out, _ = command("plan", "video.yaml", "--set", "steps=4")
    assert code == 0
    assert runner.calls[0][1][0].pipeline.options.steps == 4
    bar = "\u2588"
    assert [line.rstrip() for line in out.splitlines()] == [
        "stage  passes  weights  retained  slots    reads  compute  stalled    time",
        "dit      \u2264 30  1.0 GiB   2 of 28      3  5.0 GiB   9.00 s   0.50 s  9.50 s",
        "",
        "dit     28 x block.* of 1.0 MiB",
        "        stays: block.0, block.4 (evenly spaced in compute time)",
        "        costs: measured in earlier runs",
        "peak    1.0 GiB of a budget of 2.0 GiB: 300 MiB runtime, 600 MiB weights, 124",
        "        MiB activations",
        "in all  9.50 s, 0.50 s of it waiting for loads; 5.0 GiB are read, 15.0 PiB a",
        "        year at this rate",
        "more    +1.00 GiB of budget saves 0.50 s and 4.0 GiB of reading",
        "",
        "budget     predicted",
        f"900 MiB    19.0 s      {bar * 30}",
        f"1.00 GiB   9.50 s      {bar * 15}  the knee, this plan",
        f"2.00 GiB   9.00 s      {bar * 14}",
        f"4.00 GiB   9.00 s      {bar * 14}  everything stays",
        "900 MiB: 19.0 s, the least that works; beyond 2.00 GiB nothing",
    ]


def test_what_a_plugin_prints_does_not_come_between_json(command, site, runner, monkeypatch):
    def chatty(*arguments, **options):
        print("hello from a plugin")
        return {"ended": True}

    monkeypatch.setattr(runner, "run", chatty)
    code, out, err = command("run", "video.yaml", "--json")
    assert (code, json.loads(out)) == (0, {"ended": True})
    assert "hello from a plugin" in err
    runner.result = {**REPORT}
    assert "hello" not in command("plan", "video.yaml", "--json")[1]


def test_json_lines_end_with_the_report(command, site, runner):
    runner.result = REPORT
    code, out, err = command("run", "video.yaml", "--json-lines")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, lines[-1]) == (0, {"report": REPORT})
    assert lines[0]["held_nbytes"] > 0 and lines[0]["stage"] is None
    assert "packaged" in err
