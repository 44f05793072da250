import pytest
import torch
from safetensors.torch import save_file

from blockstream.checkpoint import Checkpoint
from blockstream.module.empty import empty
from movd.clip import clip_entries, clip_text_model, pooled
from movd.hunyuan.llama import embed_prompt, llama_encoder, llama_entries
from movd.official import load_official

pytestmark = pytest.mark.golden
FOLDER = "llama_text_tiny"


def test_the_layers_that_are_run_equal_the_originals(golden):
    config, case = golden.meta["config"], golden.meta["cases"]
    model = llama_encoder(config)
    own = {k: v for k, v in golden.weights.items() if k in model.state_dict()}
    load_official(model, own)
    layers = config["num_hidden_layers"] - case["num_hidden_layers_to_skip"]
    assert len(model.layers) == layers
    ids, mask = golden.inputs["ids"], golden.inputs["mask"]
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for i in range(layers + 1):
        golden.close(hidden[i][mask.bool()], golden.outputs[f"hidden_states.{i}"][mask.bool()], f"layer {i}")
    states, kept = embed_prompt(model, ids, mask, case["crop_start"])
    assert torch.equal(kept, golden.outputs["prompt_mask"])
    golden.close(states[kept.bool()], golden.outputs["prompt_embeds"][kept.bool()], "prompt_embeds")


LAYOUTS = {
    "LlamaModel": "",
    "LlamaForCausalLM": "model.",
    "llava": "language_model.model.",
    "llava of transformers 5": "model.language_model.",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_strictly_and_streams(golden, tmp_path, layout):
    from blockstream import stream

    config, prefix = golden.meta["config"], LAYOUTS[layout]
    tensors = {prefix + name: value for name, value in golden.weights.items()}
    if layout != "LlamaModel":
        tensors["lm_head.weight"] = torch.zeros(64, 24)
    if "llava" in layout:
        tensors["vision_tower.embeddings.weight"] = torch.zeros(2, 2)
        config = {"model_type": "llava", "text_config": config}
    save_file(tensors, tmp_path / "model.safetensors")
    with empty():
        model = llama_encoder(config)
    entries = llama_entries(Checkpoint.open(tmp_path), config)
    assert set(entries.entries) == set(model.state_dict())
    ids, mask = golden.inputs["ids"], golden.inputs["mask"]
    with stream(lambda: model, entries, arena="64KiB") as streamed:
        states, kept = embed_prompt(streamed, ids, mask, golden.meta["cases"]["crop_start"])
    golden.close(states[kept.bool()], golden.outputs["prompt_embeds"][kept.bool()], layout)


@pytest.mark.parametrize("eos", [59, 2])
def test_clips_vector_equals_the_original(folder_of, tmp_path, eos):
    clip = folder_of("clip_text_tiny")
    model = clip_text_model({**clip.meta["config"], "eos_token_id": eos})
    extra = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "visual_projection.weight": torch.zeros(2),
    }
    save_file({**clip.weights, **extra}, tmp_path / "model.safetensors")
    entries = clip_entries(Checkpoint.open(tmp_path), model)
    assert set(entries.entries) == set(model.state_dict())
    prefix = "" if "embeddings.token_embedding.weight" in model.state_dict() else "text_model."
    load_official(model, {prefix + k.removeprefix("text_model."): v for k, v in clip.weights.items()})
    clip.close(pooled(model, clip.inputs["ids"]), clip.outputs["eos.pooler_output"], "pooled")
