"""Any pipeline of diffusers from a config: its files are those of the pipeline in memory, bit for bit."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockstream.errors import BlockstreamError, ConfigError, NonFiniteError
from blockstream.plugins import Plugins
from blockstream.report.frames import read_frames
from blockstream.run import drawing, runner
from blockstream.run import folder as run_folder
from blockstream.run.config import make_config
from blockstream.run.json_schema import config_schema, offered_by
from blockstream.verify.comparison import verify
from tests.support.models import aligned
from tests.support.stable_diffusion import save_stable_diffusion
from tests.support.tiny_pipelines import save_flux, save_wan

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

PICTURE = {"num_inference_steps": 2, "height": 16, "width": 16}


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    """Runs neither measure the disk nor draw: that takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        for drawn_by in (drawing, run_folder):
            patch.setattr(drawn_by, "draw_finished", lambda path: None)
        patch.setattr(runner, "disk_account", lambda stages, wall_s: {})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of three pipelines and of embeddings for two of them."""
    folder = tmp_path_factory.mktemp("pipelines")
    save_stable_diffusion(folder / "sd", reads_prompts=True)
    save_flux(folder / "flux")
    save_wan(folder / "wan")
    draw = torch.Generator().manual_seed(0)
    for name, shape in (("words", (1, 7, 32)), ("none", (1, 7, 32)), ("pooled", (1, 32))):
        save_file({"x": torch.randn(shape, generator=draw)}, folder / f"{name}.safetensors")
    return folder


def words(folder, **names):
    """Return a call's embeddings: files for a config."""
    return {key: str(folder / f"{name}.safetensors") for key, name in names.items()}


FLUX = {"prompt_embeds": "words", "pooled_prompt_embeds": "pooled"}
WAN = {"prompt_embeds": "words", "negative_prompt_embeds": "none"}


def config(folder, **more):
    return make_config({"pipeline": "diffusers", "folder": str(folder), "arena": "1MiB", **more})


def resident(folder, seed=42, then=lambda pipe: None, **call):
    """Return what a pipeline in memory makes, as its library does."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            aligned(part)
    then(pipe)
    call = {k: load_file(v)["x"] if str(v).endswith(".safetensors") else v for k, v in call.items()}
    return pipe(generator=torch.Generator().manual_seed(seed), **call)


def png(image) -> bytes:
    made = io.BytesIO()
    image.save(made, format="PNG")
    return made.getvalue()


def test_pictures_are_those_of_the_pipeline_in_memory(folder, tmp_path):
    prompts = ["a star", "a cat"]
    made = runner.run(config(folder / "sd", prompts=prompts, call=PICTURE), tmp_path / "out")
    assert made["output"]["files"] == ["0000/image.png", "0001/image.png"]
    assert made["output"]["pipeline"] == "StableDiffusionPipeline"
    assert {s["name"] for s in made["stages"]} == {"text_encoder", "unet", "vae"}
    assert made["budget"]["held"]
    for n, prompt in enumerate(prompts):
        want = resident(folder / "sd", prompt=prompt, **PICTURE).images[0]
        assert (tmp_path / f"out/000{n}/image.png").read_bytes() == png(want)


def test_a_transformer_of_the_flux_kind_with_another_scheduler_and_several_pictures(folder, tmp_path):
    call = {**PICTURE, "num_images_per_prompt": 2, **words(folder, **FLUX)}
    runner.run(config(folder / "flux", call=call, seed=3), tmp_path / "out")
    want = resident(folder / "flux", 3, **call).images
    for n, image in enumerate(want):
        assert (tmp_path / f"out/image-{n}.png").read_bytes() == png(image)
    scheduler = {
        "name": "FlowMatchEulerDiscreteScheduler",
        "settings": {"shift": 3.0, "stochastic_sampling": True},
    }
    other = config(folder / "flux", call=call, seed=3, scheduler=scheduler)
    runner.run(other, tmp_path / "other")
    assert (tmp_path / "other/image-0.png").read_bytes() != png(want[0])


def test_a_video_of_the_wan_kind(folder, tmp_path):
    call = {**PICTURE, "num_frames": 5, **words(folder, **WAN)}
    made = runner.run(config(folder / "wan", call=call, fps=8), tmp_path / "out")
    assert made["output"]["files"] == ["video.mp4"]
    from blockstream_diffusers.results import results_of

    (want,), _ = results_of({"frames": resident(folder / "wan", **call).frames})
    want.write(tmp_path / "want.mp4", 8, 0)
    assert (tmp_path / "out/video.mp4").read_bytes() == (tmp_path / "want.mp4").read_bytes()
    assert len(list(read_frames(tmp_path / "out/video.mp4"))) == 5
    one = config(folder / "wan", call={**call, "num_frames": 1}, dtype={"default": "bf16", "vae": "fp32"})
    assert runner.run(one, tmp_path / "one")["output"]["files"] == ["image.png"]


def test_a_run_goes_on_with_the_prompt_it_was_left_at(folder, tmp_path, monkeypatch):
    chosen = config(folder / "sd", prompts=["a star", "a cat"], call=PICTURE)
    call = diffusers.StableDiffusionPipeline.__call__

    def dies(self, *args, prompt=None, **kwargs):
        if prompt == "a cat":
            raise RuntimeError("the plug was pulled")
        return call(self, *args, prompt=prompt, **kwargs)

    dies.__signature__ = __import__("inspect").signature(call)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", dies)
    with pytest.raises(BlockstreamError, match="the plug was pulled"):
        runner.run(chosen, tmp_path / "out")
    monkeypatch.undo()
    first = (tmp_path / "out/0000/image.png").stat()
    report = runner.run(chosen, tmp_path / "out", resume=True)
    assert report["output"]["files"] == ["0000/image.png", "0001/image.png"]
    assert (tmp_path / "out/0000/image.png").stat().st_mtime_ns == first.st_mtime_ns
    want = resident(folder / "sd", prompt="a cat", **PICTURE).images[0]
    assert (tmp_path / "out/0001/image.png").read_bytes() == png(want)
    assert runner.run(chosen, tmp_path / "out", resume=True) == report


def test_a_plan_expects_a_pass_a_step_and_verify_finds_the_same_bits(folder):
    call = {**PICTURE, "num_inference_steps": 5}
    chosen = config(folder / "sd", prompt="a star", call=call)
    plan = runner.plan(chosen)
    assert {s["name"]: s["passes"] for s in plan["stages"]} == {"text_encoder": 1, "unet": 5, "vae": 1}
    found = verify(chosen)
    assert found["equal"], found


def test_what_a_call_does_not_take_is_refused_by_name(folder, tmp_path):
    for more, said in (
        ({"call": {"num_inference_stpes": 2}}, "num_inference_stpes.*did you mean 'num_inference_steps'"),
        ({"call": {"prompt": "x"}}, r"call\.prompt: is not set here; write prompt"),
        ({"call": {"generator": 1}}, r"call\.generator: .*write seed"),
        ({"call": {"latents": "nowhere.safetensors"}}, r"nowhere\.safetensors: .*needs a file"),
        ({"call": {**PICTURE, "height": 13}}, "StableDiffusionPipeline refuses: .*13"),
        ({"scheduler": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        (
            {"scheduler": {"name": "DDIMScheduler", "settings": {"bta_start": 1}}},
            r"bta_start: .*did you mean 'beta_start'",
        ),
        ({"sampler": "lpl"}, "samples by its scheduler"),
        ({"attention": ["tdtm"]}, "takes no attention transforms"),
        ({"variant": "fp16"}, "holds nothing of variant 'fp16'"),
        ({"dtype": "int3"}, "dtype"),
        ({"lora": [{"path": "nowhere"}]}, "lora: .*nowhere: there is no such file"),
        ({"folder": str(folder / "sd" / "unet")}, r"has no model_index\.json"),
        ({"folder": "some/model"}, "nor a model of that name in the local cache"),
    ):
        given = {"folder": str(folder / "sd"), "prompt": "a star", **more}
        with pytest.raises(BlockstreamError, match=said):
            runner.run(make_config({"pipeline": "diffusers", "arena": "1MiB", **given}), tmp_path / "out")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.png"))
        __import__("shutil").rmtree(tmp_path / "out", ignore_errors=True)


def test_numbers_that_are_not_finite_end_the_run(folder, tmp_path, monkeypatch):
    decode = diffusers.AutoencoderKL.decode

    def broken(self, *args, **kwargs):
        made = decode(self, *args, **kwargs)
        return tuple(x * float("nan") for x in made)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", broken)
    with pytest.raises(NonFiniteError, match="images of prompt 0"):
        runner.run(config(folder / "sd", prompt="a star", call=PICTURE), tmp_path / "out")


def test_pictures_of_arguments_and_results_of_other_kinds(tmp_path):
    from blockstream_diffusers.arguments import Arguments
    from blockstream_diffusers.results import results_of
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    pipe = object.__new__(diffusers.StableDiffusionImg2ImgPipeline)
    arguments = Arguments(pipe, {"image": [picture, picture], "strength": 0.5}, True)
    assert [i.size for i in arguments.values()["image"]] == [(4, 4)] * 2
    assert list(arguments.identity()) == ["a.png"]
    with pytest.raises(ConfigError, match="DDPMPipeline takes no prompt"):
        Arguments(object.__new__(diffusers.DDPMPipeline), {}, True)
    sound = np.linspace(-1, 1, 8, dtype=np.float32)
    made, said = results_of({"audios": sound[None], "depth": np.zeros((1, 2)), "nsfw": [False], "x": None})
    assert [r.stem + r.suffix for r in made] == ["audio.wav", "depth.safetensors"]
    assert said == {"nsfw": [False]}
    for result in made:
        result.write(tmp_path / "made", 24, 16_000)
        assert (tmp_path / "made").stat().st_size


def test_its_keys_are_in_the_schema():
    text = json.dumps(config_schema(offered_by(Plugins(), ["builtin", "diffusers"])))
    assert all(re.search(rf'"{key}"', text) for key in ("folder", "call", "scheduler", "lora", "vae_tiling"))


@pytest.fixture(scope="module")
def loras(folder):
    """Return two files of adapters for the Stable Diffusion, in the layouts of diffusers and of kohya."""
    peft = pytest.importorskip("peft")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "sd/unet")
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = peft.get_peft_model_state_dict(unet)
        diffusers.StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=layers)
    file = folder / "a" / "pytorch_lora_weights.safetensors"
    return file, folder / "b"


def test_adapters_give_the_picture_of_the_pipeline_in_memory(folder, loras, tmp_path):
    a, b = loras
    chosen = [{"path": str(a), "scale": 0.7}, {"path": str(b), "scale": 2}]
    runner.run(config(folder / "sd", prompt="a star", call=PICTURE, lora=chosen), tmp_path / "out")

    def adapted(pipe):
        for n, path in enumerate((a.parent, b)):
            pipe.load_lora_weights(path, adapter_name=f"lora{n}")
        pipe.set_adapters(["lora0", "lora1"], [0.7, 2.0])

    want = resident(folder / "sd", then=adapted, prompt="a star", **PICTURE).images[0]
    assert (tmp_path / "out/image.png").read_bytes() == png(want)
    plain = resident(folder / "sd", prompt="a star", **PICTURE).images[0]
    assert png(plain) != png(want)
    for by_segment in (False, True):
        chosen_again = config(folder / "sd", prompt="a star", call=PICTURE, lora=chosen)
        assert verify(chosen_again, by_segment=by_segment)["equal"]


def test_adapters_that_do_not_fit_are_refused_by_name(folder, loras, tmp_path):
    held = load_file(loras[0])
    first = next(iter(held))
    for name, tensors, said in (
        ("other", {f"transformer.{k}": v for k, v in held.items()}, "of its 32 tensors .* 0 have a place"),
        ("short", {k: v for k, v in held.items() if k != first}, "of its 31 tensors|cannot load it"),
        ("wide", {k: v.repeat(1, 2) for k, v in held.items()}, "cannot load it: .*size mismatch"),
        (
            "more",
            {**held, "unet.nothing.to_q.lora_A.weight": held[first].clone()},
            "has tensors for layers that",
        ),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        chosen = config(
            folder / "sd", prompt="x", call=PICTURE, lora=[{"path": str(tmp_path / f"{name}.safetensors")}]
        )
        with pytest.raises(ConfigError, match=rf"lora: .*{name}\.safetensors: .*({said})"):
            runner.plan(chosen)
    with pytest.raises(ConfigError, match="holds 0 safetensors files"):
        runner.plan(config(folder / "sd", prompt="x", lora=[{"path": str(folder / "sd")}]))
