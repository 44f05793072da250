"""A pipeline of diffusers in one line: its networks are stages of one schedule."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ModelError
from tests.support.stable_diffusion import save_stable_diffusion

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("pipe"))


def image(pipe, **options):
    """Return what a pipeline makes of ids and a seed, and count its steps."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        words = pipe.text_encoder(torch.arange(1, 8)[None])[0]
    steps = []
    made = pipe(
        prompt_embeds=words.float(),
        negative_prompt_embeds=torch.zeros_like(words.float()),
        num_inference_steps=3,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        callback_on_step_end=lambda pipe, step, t, kwargs: steps.append(step) or {},
        **options,
    ).images
    assert steps == [0, 1, 2]
    return made


@pytest.mark.parametrize("arena", ["300KiB", "64MiB"])
def test_a_folders_pipeline_makes_the_image_that_it_makes_resident(arena, folder):
    want = image(diffusers.StableDiffusionPipeline.from_pretrained(folder, tokenizer=None))
    with blockstream.pipeline(folder, arena=arena) as pipe:
        session = blockstream.session(pipe.unet)
        assert session.names == ("text_encoder", "unet", "vae")
        for _ in range(2):
            assert torch.allclose(image(pipe), want, atol=1e-5)
        pipe.vae.enable_tiling()
        assert image(pipe).shape == want.shape


def test_a_pipeline_that_is_there_is_streamed_from_the_folder_it_was_made_from(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, tokenizer=None)
    want = image(pipe)
    with blockstream.pipeline(pipe, arena="1MiB") as streamed:
        assert streamed is pipe
        assert torch.allclose(image(streamed), want, atol=1e-5)
    assert torch.allclose(image(pipe), want, atol=1e-5)


def test_networks_take_the_dtypes_that_are_named(folder):
    with blockstream.pipeline(folder, dtype={"vae": "fp32", "default": "bf16"}) as pipe:
        assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    with blockstream.pipeline(folder, dtype="bf16") as pipe:
        assert pipe.vae.dtype is pipe.text_encoder.dtype is torch.bfloat16


def test_what_is_no_pipeline_is_refused_by_name(folder, tmp_path):
    for given, said in (
        (folder / "unet", r"has no model_index\.json"),
        (object(), "takes a folder or a pipeline of diffusers, not object"),
        (tmp_path, r"has no model_index\.json"),
    ):
        with pytest.raises(ModelError, match=said), blockstream.pipeline(given):
            pass
    for index, said in (
        ({}, "names no pipeline"),
        ({"_class_name": "NoPipeline"}, "names NoPipeline of diffusers, which is not installed"),
        ({"_class_name": "DDPMPipeline", "unet": ["my_code", "Net"]}, "Net of my_code, .* is not run"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=said), blockstream.pipeline(tmp_path):
            pass
    pipe = blockstream.pipeline(folder)
    with pytest.raises(ModelError, match=r"`with blockstream\.pipeline\(\.\.\.\) as model:`"):
        pipe(prompt="a star")


def dduf(folder, path, how=zipfile.ZIP_STORED):
    """Pack a pipeline's folder as a DDUF file."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def test_a_dduf_file_is_read_in_place(folder, tmp_path):
    with blockstream.pipeline(folder, arena="1MiB") as pipe:
        want = image(pipe)
    with blockstream.pipeline(dduf(folder, tmp_path / "sd.dduf"), arena="1MiB") as pipe:
        checkpoint = blockstream.session(pipe.unet).checkpoints["unet"]
        assert {file.path for file in checkpoint.files} == {tmp_path / "sd.dduf"}
        assert torch.equal(image(pipe), want)
    with pytest.raises(CheckpointError, match=r"a DDUF file.*blockstream\.pipeline\(\)"):
        Checkpoint.open(tmp_path / "sd.dduf")
    (tmp_path / "no.dduf").write_bytes(b"no archive")
    for path, said in (
        (dduf(folder, tmp_path / "small.dduf", zipfile.ZIP_DEFLATED), "is compressed"),
        (dduf(folder / "unet", tmp_path / "unet.dduf"), r"has no model_index\.json"),
        (tmp_path / "no.dduf", "is no archive"),
    ):
        with pytest.raises(CheckpointError, match=said), blockstream.pipeline(path):
            pass
    with (
        pytest.raises(CheckpointError, match="holds no weights of variant 'fp16'"),
        blockstream.pipeline(tmp_path / "sd.dduf", variant="fp16"),
    ):
        pass


def read_by(session):
    return sum(stage["read_nbytes"] for stage in session.report()["stages"])


def test_what_fits_is_read_once_however_often_the_pipeline_is_called(folder):
    with blockstream.pipeline(folder, arena="1MiB") as pipe:
        session = blockstream.session(pipe.unet)
        planned = session.draft()
        assert planned.keeps and planned.arena_nbytes <= 1 << 20
        made, read, unplanned = [], [], []
        for _ in range(3):
            made.append(image(pipe))
            read.append(read_by(session))
            unplanned.append(session.unplanned)
        assert read[0] == read[1] == read[2]
        assert unplanned[0] == unplanned[2]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_where_not_all_fits_each_call_is_planned_as_the_first_was(folder):
    with blockstream.pipeline(folder, arena="300KiB") as pipe:
        session = blockstream.session(pipe.unet)
        assert not session.draft().keeps
        read, unplanned = [0], []
        for _ in range(3):
            image(pipe)
            read.append(read_by(session))
            unplanned.append(session.unplanned)
        assert read[3] - read[2] <= read[1]
        assert unplanned[0] == unplanned[2]


def test_stages_of_known_passes_are_kept_once_they_are_called_in_turn_again(folder):
    with blockstream.open(arena="1MiB") as session, torch.no_grad():
        unet = session.stage("unet", folder / "unet", passes=2)
        vae = session.stage("vae", folder / "vae", passes=1)
        assert not session.draft().keeps
        x, words = torch.ones(1, 4, 8, 8), torch.ones(1, 7, 16)
        read = []
        for _ in range(4):
            for _ in range(2):
                unet(x, 3, words)
            vae.decode(x)
            read.append(read_by(session))
        assert read[1] > read[0] and read[1] == read[2] == read[3]
