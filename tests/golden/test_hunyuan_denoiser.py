import pytest
import torch
from safetensors.torch import save_file

from blockstream.checkpoint import Checkpoint
from movd.hunyuan.denoiser import full_attentions, hunyuan_denoiser
from movd.hunyuan.tencent import diffusers_entries, is_tencents
from movd.official import load_official

pytestmark = pytest.mark.golden
FOLDER = "hunyuan_tiny"


@pytest.fixture(scope="module")
def model(golden):
    model = hunyuan_denoiser(golden.meta["config"])
    load_official(model, golden.weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_output_and_every_block_equal_the_originals(model, golden, case):
    given, want = golden.given(case), golden.expected(case)
    seen, hooks = {}, []
    for name in {name.removesuffix(".1") for name in want} - {"sample"}:
        path = name if name in dict(model.named_modules()) else None
        if path is None:  # a block's first output carries its own number
            continue
        hooks.append(model.get_submodule(path).register_forward_hook(_note(seen, name)))
    seen["sample"] = model(**given, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 8
    valid = given["encoder_attention_mask"].bool()
    compared = 0
    for name, value in want.items():
        mine = seen.get(name)
        if mine is None:
            continue
        compared += 1
        is_text = name == "context_embedder" or mine.shape[1] == valid.shape[1] != want["x_embedder"].shape[1]
        if is_text and mine.dim() == 3:
            golden.close(mine[valid], value[valid], f"{case}.{name}")
        else:
            golden.close(mine, value, f"{case}.{name}")
    assert compared == len(want)


def _note(seen, name):
    def hook(module, inputs, output):
        values = output if isinstance(output, tuple) else (output,)
        for i, value in enumerate(v for v in values if v is not None):
            seen[name if i == 0 else f"{name}.{i}"] = value

    return hook


def test_every_attention_is_found_in_the_order_of_a_pass(model):
    names = [name for name, _ in full_attentions(model)]
    assert names == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]


def _diffusers_config(config):
    return {
        "in_channels": config["cin"],
        "out_channels": config["cin"],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["hidden"] // config["heads"],
        "num_layers": config["double"],
        "num_single_layers": config["single"],
        "num_refiner_layers": config["refiner_depth"],
        "mlp_ratio": config["mlp_width_ratio"],
        "text_embed_dim": config["text"],
        "pooled_projection_dim": config["pooled"],
        "rope_axes_dim": config["rope"],
    }


@pytest.mark.parametrize("form", ["safetensors", "module in a torch file"])
def test_tencents_layout_is_read_as_it_lies(folder_of, tmp_path, form):
    from blockstream import stream

    original = folder_of("hunyuan_original_tiny")
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(original.weights, path)
    else:
        path = tmp_path / "mp_rank_00_model_states.pt"
        torch.save({"module": original.weights}, path)
    opened = Checkpoint.open(path)
    assert is_tencents(opened)
    config = _diffusers_config(original.meta["config"])
    given = {name.split(".")[-1]: value for name, value in original.inputs.items()}
    want = {name.split(".")[-1]: value for name, value in original.outputs.items()}
    entries = diffusers_entries(opened)
    inputs = {
        "hidden_states": given["x"],
        "timestep": given["t"],
        "encoder_hidden_states": given["text"],
        "encoder_attention_mask": given["mask"],
        "pooled_projections": given["pooled"],
        "guidance": given["guidance"],
    }
    streamed = stream(lambda: hunyuan_denoiser(config, tencents=True), entries, arena="1MiB")
    with torch.inference_mode(), streamed as model:
        out = model(**inputs, return_dict=False)[0]
    original.close(out, want["out"], "out")
