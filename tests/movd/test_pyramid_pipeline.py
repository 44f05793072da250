"""The pipeline pyramid-flow from a config to a video: many flows a prompt, resumed at any of them."""

import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blockstream.errors import ConfigError
from blockstream.report.record import read_run
from blockstream.report.straightness import panels_of
from blockstream.run import runner
from blockstream.run.config import make_config
from movd.pyramid.legs import FIRST
from tests.support.family_models import write_pyramid
from tests.support.interrupted import Gate, raise_interrupt
from tests.support.planned import Planned

PROMPT = "a red star moving left slowly"
#: Passes of three latent frames: (2 + 1 + 2) of the first, (1 + 2 + 1) of each other.
PASSES = 5 + 2 * 4


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid") / "pyramid-flow-miniflux"
    write_pyramid(folder)
    return folder


@pytest.fixture(name="config", scope="module")
def _config(folder):
    def make(**more):
        keys = {
            "pipeline": "pyramid-flow",
            "model": str(folder),
            "prompt": PROMPT,
            "suffix": " on black",
            "negative": "a circle",
            "height": 64,
            "width": 128,
            "frames": 17,
            "steps": [2, 1, 2],
            "video_steps": [1, 2, 1],
            "threads": 1,
            "arena": "512KiB",
            "cache": "off",
            "save_every": 1,
            **more,
        }
        return make_config({key: value for key, value in keys.items() if value is not None})

    return make


@pytest.fixture(name="plain", scope="module")
def _plain(config, tmp_path_factory):
    """A run with everything in memory: its folder and report."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, runner.run(config(arena="64MiB"), out)


def latents(out):
    return load_file(Path(out) / "latents.safetensors")["z"]


def passes(report):
    return {stage["name"]: stage["passes"] for stage in report["stages"]}


def test_a_prompt_becomes_a_video_unit_by_unit_and_stage_by_stage(plain):
    out, report = plain
    assert passes(report) == {"t5": 2, "clip": 2, "dit": PASSES, "vae": 2}
    assert (report["sampler"]["passes"], len(report["sampler"]["runs"])) == (PASSES, 9)
    with av.open(str(out / "video.mp4")) as video:
        frames = list(video.decode(video=0))
    assert (len(frames), frames[0].height, frames[0].width) == (17, 64, 128)
    assert latents(out).shape == (1, 4, 3, 8, 16)
    assert not (out / "state").exists()


def test_streamed_from_an_arena_smaller_than_the_weights_gives_the_same_bits(config, plain, tmp_path):
    out, report = plain
    small = runner.run(config(policy="none"), tmp_path / "small")
    read = [{s["name"]: s["read_nbytes"] for s in r["stages"]} for r in (small, report)]
    assert read[0]["dit"] > 2 * read[1]["dit"]
    assert torch.equal(latents(tmp_path / "small"), latents(out))
    assert (tmp_path / "small" / "video.mp4").read_bytes() == (out / "video.mp4").read_bytes()


def test_the_ledger_tells_each_flow_by_its_unit_and_stage(plain):
    panels = panels_of(read_run(plain[0]), "out")
    found = {title: [line.name for line in lines] for title, lines in panels.items()}
    # A cosine needs two steps: see the config's.
    assert found == {"out: unit 1": ["stage 1", "stage 3"], "out: unit 3": ["stage 2"]}


@pytest.mark.parametrize("stage, at", [("t5", 1), ("dit", 0), ("dit", 7), ("dit", PASSES - 1), ("vae", 1)])
def test_a_run_that_is_stopped_at_any_stage_goes_on_to_the_same_bits(config, plain, tmp_path, stage, at):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner.run(config(), out, observers=[Gate(stage, at, raise_interrupt)])
    report = runner.run(config(), out, resume=True)
    assert torch.equal(latents(out), latents(plain[0]))
    assert (out / "video.mp4").read_bytes() == (plain[0] / "video.mp4").read_bytes()
    done = {"t5": 0, "dit": at if stage == "dit" else PASSES if stage == "vae" else 0}
    assert passes(report).get("dit", 0) == PASSES - done["dit"]


def test_every_flow_leaps_to_the_end_of_its_stage(config, tmp_path):
    more = {"steps": [4, 4, 4], "video_steps": [4, 2, 4], "sampler": {"name": "lpl", "leap": 2}, "frames": 9}
    report = runner.run(config(**more), tmp_path / "out")
    said = report["output"]["sampler"][0]["flows"]
    assert [(flow["passes"], flow["of"]) for flow in said] == [(3, 4)] * 4 + [(2, 2), (3, 4)]
    assert passes(report)["dit"] == 17


def test_the_first_frame_may_be_an_image_and_the_rest_follows_it(config, plain, tmp_path):
    Image.new("RGB", (128, 64), (200, 40, 40)).save(tmp_path / "red.png")
    report = runner.run(config(reference=str(tmp_path / "red.png")), tmp_path / "out")
    assert passes(report) == {"vae-encoder": 1, "t5": 2, "clip": 2, "dit": 8, "vae": 2}
    z = latents(tmp_path / "out")
    assert z.shape == latents(plain[0]).shape
    assert FIRST == (-0.04, 1 / 1.8726)
    assert not torch.equal(z[:, :, 0], latents(plain[0])[:, :, 0])


def test_the_plan_follows_every_flow(config):
    plan = runner.plan(config())
    assert {stage["name"]: stage["passes"] for stage in plan["stages"]}["dit"] == PASSES


def test_a_folder_that_is_not_there_is_planned_with_the_released_networks(config, tmp_path):
    more = {"height": 384, "width": 640, "frames": 121, "steps": None, "video_steps": None}
    family = config(model=str(tmp_path / "none"), **more).pipeline.build().family
    family.open(Planned())
    assert family.dit.checkpoint.nbytes == 2 * 1_972_059_200
    assert family.vae.checkpoint.nbytes == 2 * 335_402_067
    assert sum(leg.steps for leg in family.legs()) == 60 + 15 * 30
    rows = family.pace(None, None)
    assert [len(row) for row in rows] == [leg.steps for leg in family.legs()]
    assert rows[0][0] < 0.05 < rows[2][0] < rows[-1][0] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"height": 96}, "height = 96 is no multiple of 64"),
        ({"frames": 16}, "frames = 16 is not 8 k . 1; 17 is the nearest"),
        ({"steps": [2, 0, 2]}, "1 to 1000 are taken in each stage"),
        ({"steps": [2, 2]}, "at least 3 items"),
        ({"model": None}, "name the folder of the checkpoints, model, or those of t5, clip, dit, vae"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config, more, said):
    with pytest.raises(ConfigError, match=said):
        config(**more)


def test_attention_transforms_are_refused_with_the_reason(config, tmp_path):
    with pytest.raises(ConfigError, match="no two frames can be merged"):
        runner.run(config(attention=["tdtm"]), tmp_path / "out")


def test_the_config_of_another_class_is_refused(config, folder, tmp_path):
    own = tmp_path / "dit"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ConfigError, match="is not 'PyramidFluxTransformer'"):
        runner.run(config(dit={"path": str(own)}), tmp_path / "out")
