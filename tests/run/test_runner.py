"""A run: its folder, its config, its report, with a pipeline of one small module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blockstream.engine.ledger import Ledger, read_records, unaccounted
from blockstream.errors import BudgetError, ConfigError, PluginError
from blockstream.module.empty import empty
from blockstream.plugins import Choice, Plugins, hookimpl
from blockstream.plugins.choices import Chosen
from blockstream.run import runner
from blockstream.run.activation import activate
from blockstream.run.config import RunConfig
from blockstream.run.numerics import pinned


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class ToyPipeline:
    def __init__(self, folder: Path, fail: bool = False) -> None:
        self.folder, self.fail = folder, fail

    def declare(self, session, run):
        with empty():
            net = Net()
        self.net = session.stage("net", net, self.folder, passes=3)
        run.files.declare(["latents.safetensors"], ["0000"])

    @torch.inference_mode()
    def run(self, session, run):
        x = torch.ones(2, 64)
        with run.phase("work"):
            for _ in range(3):
                x = self.net(x)
                if self.fail:
                    raise RuntimeError("the pipeline broke")
        run.files.write("latents.safetensors", b"x")
        return {"sum": float(x.sum())}


@pytest.fixture(name="config")
def _config(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "net").mkdir()
    save_file(Net().state_dict(), tmp_path / "net" / "model.safetensors")
    return lambda **more: make(tmp_path / "net", **more)


def tree(folder):
    """Return the bytes of every file in a folder, by name."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def make(folder, fail=False, arena=4 * 20480, **more):
    plugins = Plugins()
    policy = Chosen("policy", "auto", *plugins.find("policy", "auto"))
    sampler = Chosen("sampler", "euler", *plugins.find("sampler", "euler"))
    pipeline = Chosen("pipeline", "toy", "builtin", Choice("toy", lambda _: ToyPipeline(folder, fail)))
    return RunConfig(pipeline=pipeline, policy=policy, sampler=sampler, arena=arena, **more)


def test_a_run_writes_its_config_ledger_and_report(config, tmp_path, caplog):
    report = runner.run(config(), tmp_path / "out")
    assert not caplog.messages  # what could not be drawn is said here
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    written = {"config.yaml", "ledger.jsonl", "report.json", "report.html", "timeline.png", "trace.json"}
    assert written <= set(os.listdir(tmp_path / "out"))
    assert set(report) >= {"schema", "budget", "stages", "sampler", "output", "versions"}
    assert set(report["budget"]) >= {"nbytes", "peak_nbytes", "held", "by_cause"}
    (stage,) = report["stages"]
    wanted = "name passes b d l_s e_s alpha_s r_s overlap stall_s wall_s predicted_s read_nbytes"
    assert set(wanted.split()) <= set(stage)
    assert (stage["name"], stage["passes"], stage["b"]) == ("net", 3, 6)
    assert sum(report["budget"]["by_cause"].values()) == report["budget"]["peak_nbytes"]


def test_the_streamed_result_is_the_resident_one(config, tmp_path):
    from safetensors.torch import load_file

    net = Net()
    net.load_state_dict(load_file(tmp_path / "net" / "model.safetensors"))
    x = torch.ones(2, 64)
    with torch.inference_mode():
        for _ in range(3):
            x = net(x)
    assert runner.run(config(), tmp_path / "out")["output"]["sum"] == float(x.sum())


def test_measured_spans_tile_the_run(config, tmp_path):
    report = runner.run(config(), tmp_path / "out")
    spans = read_records(tmp_path / "out" / "ledger.jsonl").spans
    assert report["unaccounted"] <= 0.01
    assert unaccounted(spans, report["wall_s"]) <= 0.01
    inside = [s for s in spans if s.thread == "compute" and s.end_s <= report["wall_s"]]
    longest = max(inside, key=lambda s: s.seconds)
    assert unaccounted([s for s in spans if s is not longest], report["wall_s"]) > 0.01


def test_products_of_int8_are_pinned_in_the_written_config(config, tmp_path):
    from blockstream.module.layers.int8 import resolve

    runner.run(config(), tmp_path / "out")
    assert f"int8: {resolve('auto')}\n" in (tmp_path / "out" / "config.yaml").read_text()


def test_compute_threads_are_pinned_in_the_written_config(config, tmp_path):
    runner.run(config(), tmp_path / "out")
    assert f"threads: {torch.get_num_threads()}" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_folder_that_is_not_empty_is_refused(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"not empty \(mine.txt\).*--resume .*--overwrite"):
        runner.run(config(), tmp_path / "out")


def test_overwrite_replaces_a_run_and_refuses_a_folder_with_anything_else(config, tmp_path):
    out = tmp_path / "out"
    runner.run(config(), out)
    (out / "0000").mkdir()
    for name in ("mine.txt", "0000/notes.txt", ".env.1", ".notes.part"):
        (out / name).write_text("keep me")
    before = tree(out)
    with pytest.raises(ConfigError, match=r"no run has made \(.env.1, .notes.part, 0000/ and 1 more\)"):
        runner.run(config(), out, overwrite=True)
    assert tree(out) == before
    for name in ("mine.txt", "0000/notes.txt", ".env.1", ".notes.part"):
        (out / name).unlink()
    (out / "0000").rmdir()
    runner.run(config(), out, overwrite=True)
    assert set(tree(out)) == set(before) - {"mine.txt", "0000/notes.txt", ".env.1", ".notes.part"}


def test_overwrite_of_a_folder_that_was_never_a_run_touches_nothing(config, tmp_path):
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    for name in ("config.yaml", "report.json", "state/mine", ".env.1"):
        (out / name).write_text("keep me")
    before = tree(out)
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(ConfigError):
            runner.run(config(), out, **options)
        assert tree(out) == before


@pytest.mark.parametrize("refused", [{"budget": "1MiB", "arena": "auto"}, {"arena": "1KiB"}])
def test_a_run_that_is_refused_deletes_nothing_of_the_one_it_was_to_replace(config, tmp_path, refused):
    out = tmp_path / "out"
    runner.run(config(), out)
    before = tree(out)
    for options in ({"overwrite": True}, {"resume": True}):
        if options.get("resume"):
            (out / "latents.safetensors").unlink()
            del before["latents.safetensors"]
        with pytest.raises(BudgetError):
            runner.run(config(**refused), out, **options)
        assert tree(out) == before


def test_nothing_is_removed_through_a_link(config, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    runner.run(config(), out)
    elsewhere.mkdir()
    (elsewhere / "0000.safetensors").write_text("mine")
    (out / "state").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="no run has made"):
        runner.run(config(), out, overwrite=True)
    (out / "latents.safetensors").unlink()
    with pytest.raises(ConfigError, match="is a link"):
        runner.run(config(), out, resume=True)
    assert (elsewhere / "0000.safetensors").read_text() == "mine"


def test_a_folder_in_use_is_refused_whatever_is_removed_from_it(config, tmp_path):
    from blockstream.system.atomic import locked

    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        for path in out.iterdir():
            path.unlink()
        with pytest.raises(ConfigError, match="another run"):
            runner.run(config(), out)
    runner.run(config(), out)


def test_a_failed_run_keeps_its_ledger_and_says_how_to_go_on(config, tmp_path, caplog):
    with pytest.raises(PluginError, match="pipeline 'toy': RuntimeError: the pipeline broke"):
        runner.run(config(fail=True), tmp_path / "out")
    assert any(s.kind == "execute" for s in read_records(tmp_path / "out" / "ledger.jsonl").spans)
    assert not (tmp_path / "out" / "report.json").exists()
    assert "--resume" in caplog.text
    runner.run(config(), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("refused", [{"budget": "1MiB", "arena": "auto"}, {"arena": "1KiB"}])
def test_a_run_that_is_refused_leaves_nothing(config, tmp_path, refused):
    with pytest.raises(BudgetError):
        runner.run(config(**refused), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(BudgetError):
        runner.run(config(**refused), tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_pipeline_that_exits_has_failed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyPipeline, "run", lambda *arguments: sys.exit(0))
    with pytest.raises(PluginError, match="pipeline 'toy': SystemExit: 0"):
        runner.run(config(), tmp_path / "out")


def test_a_file_that_was_not_declared_is_refused_by_name(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyPipeline, "run", lambda self, session, run: run.files.write("else", b""))
    with pytest.raises(PluginError, match="pipeline 'toy': EngineError: else was not declared"):
        runner.run(config(), tmp_path / "out")


def test_observers_see_the_run_in_order(config, tmp_path):
    seen = []

    class Watcher:
        @hookimpl
        def run_started(self, run):
            seen.append(("run", run.out.name))

        @hookimpl
        def stage_started(self, stage):
            seen.append(("stage", stage.name))

        @hookimpl
        def pass_finished(self, stage, pass_index):
            seen.append(("pass", pass_index))

        @hookimpl
        def stage_finished(self, stage):
            seen.append(("end", stage.name))

        @hookimpl
        def run_finished(self, run, report):
            seen.append(("done", report["stages"][0]["passes"]))

    runner.run(config(), tmp_path / "out", observers=[Watcher()])
    passes = [("pass", n) for n in range(3)]
    assert seen == [("run", "out"), ("stage", "net"), *passes, ("end", "net"), ("done", 3)]


class Failed:
    """Hears of failures; may fail at it."""

    def __init__(self, raises=False):
        self.told, self.raises = [], raises

    @hookimpl
    def run_failed(self, run, error):
        self.told.append((run.out.name, str(error)))
        if self.raises:
            raise OSError("the observer's disk is gone")


@pytest.mark.parametrize("raises", [False, True])
def test_observers_hear_of_a_run_that_fails_and_cannot_hide_why(config, tmp_path, raises, caplog):
    failed = Failed(raises)
    with pytest.raises(PluginError, match="pipeline 'toy': RuntimeError: the pipeline broke"):
        runner.run(config(fail=True), tmp_path / "out", observers=[failed])
    ((out, said),) = failed.told
    assert out == "out" and said.endswith("RuntimeError: the pipeline broke")
    assert ("the observer's disk is gone" in caplog.text) == raises


def test_observers_hear_nothing_of_a_run_that_was_never_accepted_or_went_well(config, tmp_path):
    failed = Failed()
    with pytest.raises(BudgetError):
        runner.run(config(arena="1KiB"), tmp_path / "out", observers=[failed])
    runner.run(config(), tmp_path / "out", observers=[failed])
    assert failed.told == []


def test_a_plan_reads_no_weight_and_says_what_is_retained(config):
    plan = runner.plan(config())
    (stage,) = plan["stages"]
    assert set(stage) >= {"name", "retained", "slots", "predicted_s", "stall_s"}
    assert stage["segments"] == 6
    assert plan["by_cause"]["weights"] <= 4 * 20480
    assert plan["peak_nbytes"] == sum(plan["by_cause"].values())
    assert {"budget_nbytes", "predicted_s"} <= set(plan["curve"][0])
    assert [x["name"] for x in plan["items"]] == ["set-up", stage["name"], "rest"]


@pytest.mark.parametrize("measure", ["plan", "run", ""])
def test_a_session_may_measure_as_it_is_told_to(config, measure):
    this = runner.RunInProgress(made := pinned(config()), runner.NOWHERE, Ledger(), activate(made))
    with runner.open_session(this, measure=measure):
        assert this.measuring.most_s == {"plan": 2.5, "run": 0.3, "": 0.0}[measure]


def test_default_folders_do_not_collide(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner.run(config())
    runner.run(config())
    assert sorted(os.listdir("out")) == ["config", "config-2"]


def test_the_runner_imports_no_torch_by_itself():
    code = "import sys, blockstream.run.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
