"""The pipeline hunyuan-video from a config to a video, on folders in every layout that is published."""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockstream.errors import CheckpointError, ConfigError
from blockstream.run import runner
from blockstream.run.config import make_config
from tests.support import families_tiny as tiny
from tests.support.family_models import write_hunyuan
from tests.support.planned import Planned

PROMPT = "a red star moving left slowly"


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan") / "HunyuanVideo"
    write_hunyuan(folder)
    return folder


@pytest.fixture(name="config", scope="module")
def _config(folder):
    def make(**more):
        keys = {
            "pipeline": "hunyuan-video",
            "model": str(folder),
            "height": 16,
            "width": 32,
            "frames": 9,
            "steps": 2,
            "threads": 1,
            "arena": "512KiB",
            "cache": "off",
            **more,
        }
        if "prompts" not in keys:
            keys.setdefault("prompt", PROMPT)
        return make_config({key: value for key, value in keys.items() if value is not None})

    return make


def latents(out):
    return load_file(Path(out) / "latents.safetensors")["z"]


@pytest.fixture(name="plain", scope="module")
def _plain(config, tmp_path_factory):
    """A run with everything in memory: its folder and report."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, runner.run(config(arena="64MiB"), out)


def passes(report):
    return {stage["name"]: stage["passes"] for stage in report["stages"]}


def test_a_prompt_becomes_a_video_of_the_size_and_length_asked_for(plain):
    out, report = plain
    assert passes(report) == {"llama": 1, "clip": 1, "dit": 2, "vae": 1}
    assert report["output"]["files"] == ["video.mp4"]
    with av.open(str(out / "video.mp4")) as video:
        frames = list(video.decode(video=0))
    assert (len(frames), frames[0].height, frames[0].width) == (9, 16, 32)
    assert latents(out).shape == (1, 4, 3, 2, 4)


def test_streamed_from_an_arena_smaller_than_the_weights_gives_the_same_bits(config, plain, tmp_path):
    out, report = plain
    small = runner.run(config(policy="none"), tmp_path / "small")
    read = [{s["name"]: s["read_nbytes"] for s in r["stages"]} for r in (small, report)]
    assert read[0]["dit"] > read[1]["dit"] and read[0]["llama"] >= read[1]["llama"]
    assert torch.equal(latents(tmp_path / "small"), latents(out))
    assert (tmp_path / "small" / "video.mp4").read_bytes() == (out / "video.mp4").read_bytes()


def test_a_prompt_makes_the_same_video_alone_as_among_others(config, plain, tmp_path):
    runner.run(config(prompts=["a blue circle", PROMPT]), tmp_path / "both")
    assert torch.equal(latents(plain[0]), latents(tmp_path / "both" / "0001"))
    assert not torch.equal(latents(plain[0]), latents(tmp_path / "both" / "0000"))


def test_a_negative_prompt_takes_a_second_pass_a_step_and_changes_the_result(config, plain, tmp_path):
    report = runner.run(config(negative="a circle", true_guidance=3.0), tmp_path / "guided")
    assert passes(report) == {"llama": 2, "clip": 2, "dit": 4, "vae": 1}
    assert not torch.equal(latents(tmp_path / "guided"), latents(plain[0]))


def test_merging_tokens_and_leaping_act_on_the_denoiser(config, plain, tmp_path):
    merged = config(
        attention=[{"name": "tdtm", "merge_steps": 1}], sampler={"name": "lpl", "leap": 2}, steps=4
    )
    report = runner.run(merged, tmp_path / "merged")
    assert report["attention"]["merged_layers"] == 4
    assert report["attention"]["merged_passes"] == 1
    assert passes(report)["dit"] == 3
    assert report["output"]["sampler"][0]["leaps"] == [[2, 4]]


def test_sliding_tiles_act_on_every_attention_and_merged_steps_run_dense(config, plain, tmp_path):
    windows = {"name": "sta", "windows": [1, 1, 1], "tile": [3, 1, 1], "dense_steps": 0}
    tiles = config(attention=[{"name": "tdtm", "merge_steps": 1}, windows], steps=3)
    report = runner.run(tiles, tmp_path / "tiles")
    kernels, said = report["attention"]["kernels"], report["attention"]["said"]["sta:sta"]
    assert (kernels["layers"], kernels["calls"]) == (4, 8)
    assert kernels["by_step"].keys() == {"1", "2"} and kernels["density"] < 1
    assert said["canvases"] == [{"grid": [3, 1, 2], "whole_tiles": True}]
    assert said["calls"] == {"dense": 0, "gathered": 8} and said["merged_layers_run_dense"] == 4
    small = runner.run(config(attention=[windows], policy="none"), tmp_path / "small")
    whole = runner.run(config(attention=[windows], arena="64MiB"), tmp_path / "whole")
    assert small["attention"]["kernels"] == whole["attention"]["kernels"]
    assert torch.equal(latents(tmp_path / "small"), latents(tmp_path / "whole"))
    assert not torch.equal(latents(tmp_path / "small"), latents(plain[0]))


def test_the_released_windows_are_refused_on_another_canvas(config, tmp_path):
    with pytest.raises(ConfigError, match="released table is for 30x48x80 tokens, 60 layers of 24 heads"):
        runner.run(config(attention=["sta"]), tmp_path / "out")


def test_the_schedulers_file_names_the_shift_and_options_change_the_flow(config, folder):
    def opened(**more):
        made = config(**more).pipeline.build().family
        made.open(Planned())
        return made

    assert (opened().shift, opened(shift=2.0).shift) == (5.0, 2.0)
    texts = [[prompt_of(16)], [prompt_of(12, 1)]]
    flows = [
        opened(**m).way(tiny.hunyuan(), texts, None).flow(0, lambda n: None)
        for m in ({}, {"latents": "model"})
    ]
    assert [flow.rounded for flow in flows] == [False, True]
    assert flows[0].guidance.item() == 6000.0


def prompt_of(width, tokens=5):
    return torch.ones(1, 1, tokens, width), torch.ones(1, tokens)


def test_time_tiles_are_passes_of_the_decoder(config):
    found = []
    for tiles in ("diffusers", "whole", "tencent"):
        family = config(frames=29, time_tiles=tiles).pipeline.build().family
        family.open(Planned())
        found.append((family.decoder_passes(), family.decoder_inputs()[0].shape[2]))
    assert found == [(3, 5), (1, 8), (1, 8)]


# -- layouts --------------------------------------------------------------------------------


def tencents(state):
    """Return diffusers' tensors of the DiT as Tencent's file holds them."""
    made, parts = {}, {}
    single = {"norm.linear": "modulation.linear", "proj_out": "linear2", "attn.norm_q": "q_norm"}
    single["attn.norm_k"] = "k_norm"
    double = {
        "norm1.linear": "img_mod.linear",
        "norm1_context.linear": "txt_mod.linear",
        "attn.norm_q": "img_attn_q_norm",
        "attn.norm_k": "img_attn_k_norm",
        "attn.norm_added_q": "txt_attn_q_norm",
        "attn.norm_added_k": "txt_attn_k_norm",
        "attn.to_out.0": "img_attn_proj",
        "attn.to_add_out": "txt_attn_proj",
        "ff.net.0.proj": "img_mlp.fc1",
        "ff.net.2": "img_mlp.fc2",
        "ff_context.net.0.proj": "txt_mlp.fc1",
        "ff_context.net.2": "txt_mlp.fc2",
    }
    refiner = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.to_out.0": "self_attn_proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "norm_out.linear": "adaLN_modulation.1",
    }
    plain = {
        "x_embedder.proj": "img_in.proj",
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    groups = {
        "transformer_blocks": ("double_blocks", double),
        "single_transformer_blocks": ("single_blocks", single),
    }
    joined = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    joined += ["proj_mlp"]
    for name, value in state.items():
        layer, kind = name.rsplit(".", 1)
        if layer == "norm_out.linear":
            made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat(value.chunk(2)[::-1])
            continue
        if layer in plain:
            made[f"{plain[layer]}.{kind}"] = value
            continue
        head = layer.split(".")[0]
        if head == "context_embedder":
            number, own = layer.split("refiner_blocks.")[1].split(".", 1)
            start, table = f"txt_in.individual_token_refiner.blocks.{number}", refiner
        else:
            number, own = layer.split(".", 2)[1:]
            start, table = f"{groups[head][0]}.{number}", groups[head][1]
        if own in table:
            made[f"{start}.{table[own]}.{kind}"] = value
            continue
        assert own in joined
        what = "self_attn_qkv" if "refiner" in start else "linear1" if "single" in start else None
        what = what or ("txt_attn_qkv" if "add_" in own else "img_attn_qkv")
        parts.setdefault(f"{start}.{what}.{kind}", {})[joined.index(own)] = value
    made.update({name: torch.cat([own[i] for i in sorted(own)]) for name, own in parts.items()})
    return made


def test_tencents_files_give_the_same_latents_as_diffusers_folders(config, folder, plain, tmp_path):
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    own = tmp_path / "hunyuan-video-t2v-720p"
    (own / "transformers").mkdir(parents=True)
    (own / "vae").mkdir()
    dit = own / "transformers" / "mp_rank_00_model_states.pt"
    torch.save({"module": tencents(state)}, dit)
    shutil.copy(folder / "transformer" / "config.json", own / "transformers")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(
        {"state_dict": {"vae." + name: value for name, value in vae.items()}},
        own / "vae" / "pytorch_model.pt",
    )
    official = json.loads((folder / "vae" / "config.json").read_text())
    official.update(_class_name="AutoencoderKLCausal3D", mid_block_causal_attn=True, sample_tsize=64)
    (own / "vae" / "config.json").write_text(json.dumps(official))
    more = {"dit": {"path": str(dit)}, "vae": {"path": str(own / "vae")}}
    runner.run(config(**more), tmp_path / "tencent")
    torch.testing.assert_close(latents(tmp_path / "tencent"), latents(plain[0]), atol=1e-5, rtol=1e-5)


def test_a_llama_with_a_head_gives_the_same_bits(config, folder, plain, tmp_path):
    own = tmp_path / "llama"
    shutil.copytree(folder / "text_encoder", own)
    shutil.copytree(folder / "tokenizer", own / "tokenizer")
    state = load_file(own / "model.safetensors")
    state = {"model." + name: value for name, value in state.items()}
    save_file({**state, "lm_head.weight": torch.ones(64, 16)}, own / "model.safetensors")
    runner.run(config(llama={"path": str(own)}), tmp_path / "causal")
    assert torch.equal(latents(plain[0]), latents(tmp_path / "causal"))


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"height": 24}, "height = 24 is no multiple of 16"),
        ({"frames": 16}, "frames = 16 is not 4 k . 1; 17 is the nearest"),
        ({"negative": "a circle"}, "negative is read only where true_guidance is above 1"),
        ({"true_guidance": 2.0}, "true_guidance above 1 needs a negative prompt"),
        ({"model": None}, "name the folder of the checkpoints, model, or those of llama, clip, dit, vae"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config, more, said):
    with pytest.raises(ConfigError, match=said):
        config(**more)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"_class_name": "CogVideoXDDIMScheduler"},
            "paths bend all the way; HunyuanVideo is a rectified flow",
        ),
        ({"stochastic_sampling": True}, "every step renoises"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "is not the scheduler of HunyuanVideo"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
    ],
)
def test_another_scheduler_is_refused_with_the_reason(config, folder, tmp_path, change, said):
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    path = own / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        runner.run(config(model=str(own)), tmp_path / "out")


def test_weights_of_another_model_are_refused_before_anything_is_read(config, folder, tmp_path):
    own = tmp_path / "dit"
    shutil.copytree(folder / "transformer", own)
    state = load_file(own / "diffusion_pytorch_model.safetensors")
    state.pop("proj_out.bias")
    save_file(state, own / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(proj_out.bias"):
        runner.run(config(dit={"path": str(own)}), tmp_path / "out")
    narrow = {"path": str(folder / "text_encoder_2")}
    with pytest.raises((ConfigError, CheckpointError), match="llama"):
        runner.run(config(llama=narrow), tmp_path / "out")


def test_a_folder_that_is_not_there_is_planned_with_the_released_networks(config, tmp_path, caplog):
    family = config(model=str(tmp_path / "none"), height=544, width=960, frames=129).pipeline.build().family
    family.open(Planned())
    assert family.dit.checkpoint.nbytes == 2 * 12_821_012_544
    assert family.llama.checkpoint.nbytes == pytest.approx(30 * 436.2e6 + 1.05e9, rel=0.01)
    assert family.vae.checkpoint.nbytes == 2 * 246_478_803
    assert "planned with the released network" in caplog.text
    assert family.denoiser_inputs()["hidden_states"].shape == (1, 16, 33, 68, 120)
    with pytest.raises(ConfigError, match="none/text_encoder does not exist"):
        runner.run(config(model=str(tmp_path / "none")), tmp_path / "out")
