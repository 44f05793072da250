"""A run that is stopped anywhere goes on to the same bits, and does nothing twice."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from blockstream.errors import ConfigError
from blockstream.plan.segments import AtMost
from blockstream.plugins import hookimpl
from blockstream.run import runner
from tests.support.interrupted import Gate, Passes, raise_interrupt, with_sampler

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red star", "a blue circle"]
STEPS = 5


def results(out):
    """Return the bytes of every video and the latents, by prompt."""
    folders = [out / f"{n:04d}" for n in range(len(PROMPTS))]
    videos = [(f / "video.mp4").read_bytes() for f in folders]
    return videos, [load((f / "latents.safetensors").read_bytes())["z"] for f in folders]


def assert_same(found, wanted):
    assert found[0] == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))
    assert not torch.equal(found[1][0], found[1][1])


@pytest.fixture(name="keys", scope="module")
def _keys(models):
    return {
        "pipeline": "movd",
        "prompts": PROMPTS,
        "height": 16,
        "width": 24,
        "frames": 17,
        "steps": STEPS,
        "save_every": 2,
        "cache": "off",
        "threads": 1,
        "arena": "640KiB",
        "policy": "none",
        **models,
    }


@pytest.fixture(name="whole", scope="module")
def _whole(keys, tmp_path_factory):
    """The results of runs that were not stopped, by sampler."""
    from blockstream.run.config import make_config

    made = {}

    def run(own="euler", **more):
        key = json.dumps([own, more])
        if key not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            runner.run(with_sampler(make_config({**keys, **more}), own), out)
            made[key] = results(out)
        return made[key]

    return run


def kill_at(stage, pass_index, keys, out, sampler="euler", resume=False):
    """Run in a process of its own until a pass begins, and kill it there."""
    told = {"keys": keys, "sampler": sampler, "out": str(out), "resume": resume}
    argument = json.dumps({**told, "stage": stage, "pass_index": pass_index})
    command = [sys.executable, "-m", "tests.support.interrupted", argument]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


def stop_at(stage, pass_index, config, out, resume=False):
    """Run in this process until a pass begins and interrupt it there, as Ctrl-C does."""
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, out, resume=resume, observers=[Gate(stage, pass_index, raise_interrupt)])


def go_on(config, out):
    """Resume in this process; return the passes that were made."""
    passes = Passes()
    runner.run(config, out, resume=True, observers=[passes])
    return passes.of


@pytest.mark.slow
def test_killed_in_every_stage_a_run_still_ends_in_the_same_bits(keys, whole, tmp_path, config):
    out = tmp_path / "out"
    kill_at("t5", 1, keys, out)
    kill_at("dit", STEPS + 3, keys, out, resume=True)
    kill_at("vae", 1, keys, out, resume=True)
    assert go_on(config(**keys), out) == {"vae": 1}
    assert_same(results(out), whole())
    assert not (out / "state").exists()
    assert {p.name for p in out.iterdir()} >= {
        "ledger.jsonl",
        "ledger.1.jsonl",
        "ledger.2.jsonl",
        "report.json",
    }


@pytest.mark.slow
def test_a_killed_sampler_with_memory_goes_on_to_the_same_bits(keys, whole, tmp_path, config):
    out = tmp_path / "out"
    kill_at("dit", STEPS + 3, keys, out, sampler="two_step")
    assert go_on(with_sampler(config(**keys), "two_step"), out) == {"dit": STEPS - 2, "vae": 2}
    assert_same(results(out), whole("two_step"))
    assert not torch.equal(whole("two_step")[1][0], whole()[1][0])


@pytest.mark.parametrize(
    ("stage", "pass_index", "left"),
    [
        ("t5", 0, {"t5": 2, "dit": 2 * STEPS, "vae": 2}),
        ("t5", 1, {"t5": 1, "dit": 2 * STEPS, "vae": 2}),
        ("dit", 0, {"dit": 2 * STEPS, "vae": 2}),
        ("dit", 4, {"dit": 2 * STEPS - 4, "vae": 2}),
        ("dit", STEPS + 1, {"dit": STEPS, "vae": 2}),
        ("dit", STEPS + 2, {"dit": STEPS - 2, "vae": 2}),
        ("vae", 0, {"vae": 2}),
        ("vae", 1, {"vae": 1}),
    ],
)
def test_an_interrupted_run_redoes_only_what_was_not_saved(
    config, keys, whole, tmp_path, stage, pass_index, left
):
    stop_at(stage, pass_index, config(**keys), tmp_path / "out")
    assert go_on(config(**keys), tmp_path / "out") == left
    assert_same(results(tmp_path / "out"), whole())


def test_a_sampler_of_two_passes_a_step_declares_the_ones_that_are_left(config, keys, whole, tmp_path):
    again = with_sampler(config(**keys), "heun")
    assert planned(again) == AtMost(2 * 2 * STEPS)
    stop_at("dit", 2 * STEPS + 5, again, tmp_path / "out")  # of the second prompt two steps have been saved
    begun = []

    class Begun:
        @hookimpl
        def stage_started(self, stage):
            begun.append((stage.name, stage.passes))

    passes = Passes()
    report = runner.run(again, tmp_path / "out", resume=True, observers=[passes, Begun()])
    assert passes.of == {"dit": 2 * (STEPS - 2), "vae": 2}
    assert begun[0] == ("dit", AtMost(2 * (STEPS - 2)))
    assert report["sampler"]["passes"] == 2 * (STEPS - 2) and report["sampler"]["of"] == STEPS
    assert all("last_bend" in said for said in report["output"]["sampler"])
    assert_same(results(tmp_path / "out"), whole("heun"))
    assert not torch.equal(whole("heun")[1][0], whole()[1][0])


def planned(config):
    """Return the passes of the denoiser in a plan."""
    (stage,) = [s for s in runner.plan(config)["stages"] if s["name"] == "dit"]
    return AtMost(stage["passes"])


def test_a_run_with_a_reference_image_and_a_leaping_sampler_resumes(config, keys, whole, tmp_path):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "first.png")
    more = {"reference": str(tmp_path / "first.png"), "sampler": {"name": "lpl", "leap": 3}}
    again = config(**keys, **more)
    stop_at("vae-encoder", 0, again, tmp_path / "out")
    stop_at("dit", 2, again, tmp_path / "out", resume=True)
    passes = go_on(again, tmp_path / "out")
    assert set(passes) == {"dit", "vae"}
    assert_same(results(tmp_path / "out"), whole(**more))


def test_a_finished_run_is_not_made_again_but_a_lost_video_is(config, keys, whole, tmp_path):
    out = tmp_path / "out"
    report = runner.run(config(**keys), out)
    ledger = (out / "ledger.jsonl").read_bytes()
    assert runner.run(config(**keys), out, resume=True) == json.loads(json.dumps(report))
    assert (out / "ledger.jsonl").read_bytes() == ledger
    (out / "0001" / "video.mp4").unlink()
    assert go_on(config(**keys), out) == {"vae": 1}
    assert_same(results(out), whole())


def test_a_kill_after_the_last_video_leaves_only_the_report_to_write(config, keys, whole, tmp_path):
    out = tmp_path / "out"
    runner.run(config(**keys), out)
    (out / "report.json").unlink()
    assert go_on(config(**keys), out) == {}
    assert json.loads((out / "report.json").read_text())["output"]["files"][1] == "0001/video.mp4"
    assert not (out / "state").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"steps": 6}, "steps was 5 and is 6"),
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"prompts": ["a red star", "a green star"]}, "prompts was"),
        ({"sampler": "lpl"}, "sampler was 'euler' and is"),
    ],
)
def test_other_numerics_are_refused_by_name(config, keys, tmp_path, more, named):
    stop_at("dit", 0, config(**keys), tmp_path / "out")
    with pytest.raises(ConfigError, match=f"begun with another config: {named}"):
        runner.run(config(**{**keys, **more}), tmp_path / "out", resume=True)


def test_memory_may_differ_and_threads_are_those_of_the_beginning(config, keys, whole, tmp_path):
    stop_at("dit", 3, config(**keys), tmp_path / "out")
    other = {"threads": "auto", "arena": "2MiB", "policy": "auto", "save_every": 1, "cache": "1MiB"}
    go_on(config(**{**keys, **other}), tmp_path / "out")
    assert "threads: 1\n" in (tmp_path / "out" / "config.yaml").read_text()
    assert_same(results(tmp_path / "out"), whole())


def test_other_weights_are_refused_by_name(config, keys, tmp_path):
    import shutil

    dit = tmp_path / "dit"
    shutil.copytree(keys["dit"]["path"], dit)
    own = config(**{**keys, "dit": {"path": str(dit)}})
    stop_at("dit", 3, own, tmp_path / "out")
    weights = bytearray((dit / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (dit / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="begun with another dit: "):
        runner.run(own, tmp_path / "out", resume=True)


def test_another_version_is_told_of(config, keys, tmp_path, caplog):
    stop_at("dit", 3, config(**keys), tmp_path / "out")
    path = tmp_path / "out" / "files.jsonl"
    path.write_text(path.read_text().replace(torch.__version__.partition("+")[0], "1.0"))
    with caplog.at_level(logging.WARNING):
        go_on(config(**keys), tmp_path / "out")
    assert "begun with torch 1.0" in caplog.text


def cut(path):
    os.truncate(path, 100)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path):
    (path.parent / "0001.safetensors").write_bytes(path.read_bytes())
    path.unlink()


def lose(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, empty, flip, swap, lose])
def test_a_damaged_state_is_said_to_be_and_made_again(config, keys, whole, tmp_path, damage, caplog):
    stop_at("dit", 3, config(**keys), tmp_path / "out")
    damage(tmp_path / "out" / "state" / "0000.safetensors")
    assert go_on(config(**keys), tmp_path / "out")["dit"] == 2 * STEPS
    assert ("made again" in caplog.text) == (damage is not lose)
    assert_same(results(tmp_path / "out"), whole())


@pytest.mark.parametrize("damage", [cut, empty, flip, lose])
@pytest.mark.parametrize("name", ["video.mp4", "latents.safetensors"])
def test_a_result_that_a_power_cut_left_damaged_is_made_again(config, keys, whole, tmp_path, damage, name):
    runner.run(config(**keys), tmp_path / "out")
    damage(tmp_path / "out" / "0001" / name)
    assert go_on(config(**keys), tmp_path / "out")
    assert_same(results(tmp_path / "out"), whole())


def test_a_prompt_edited_in_the_runs_own_config_is_refused(config, keys, tmp_path):
    stop_at("dit", 3, config(**keys), tmp_path / "out")
    path = tmp_path / "out" / "config.yaml"
    path.write_text(path.read_text().replace("a red star", "a green star"))
    from blockstream.run.config import load_config

    with pytest.raises(ConfigError, match=r"begun with another config: prompts was \['a red star'"):
        runner.run(load_config(path), tmp_path / "out", resume=True)


def test_states_of_an_overwritten_run_are_never_used(config, keys, whole, tmp_path):
    out = tmp_path / "out"
    other = {**keys, "prompts": ["a green square", "a white ring"], "seed": 5}
    stop_at("vae", 1, config(**other), out)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config(**keys), out, overwrite=True, observers=[Gate("dit", 3, raise_interrupt)])
    assert not list(out.glob("000?/video.mp4"))
    go_on(config(**keys), out)
    assert_same(results(out), whole())


def test_a_folder_without_a_run_cannot_be_resumed(config, keys, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"no record of a run \(files.jsonl\): none was begun there"):
        runner.run(config(**keys), tmp_path / "out", resume=True)


def test_an_interrupt_says_how_to_go_on(config, keys, tmp_path, caplog):
    stop_at("t5", 0, config(**keys), tmp_path / "out")
    assert f"blockstream run --resume {tmp_path / 'out'}" in caplog.text
