"""Checkpoints that transformers converts on loading: parts of tensors in place, arithmetic by packing."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.manifest import JOURNAL_NAME, MANIFEST_NAME
from blockstream.cli.main import main
from blockstream.errors import CheckpointError
from blockstream.module.prepared import Prepared
from blockstream.verify.reference import Reference

DINO = transformers.Dinov2Config(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    use_swiglu_ffn=True,
    mlp_ratio=2,
)
QWEN = transformers.Qwen3VLMoeConfig(
    text_config={
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    },
    vision_config={
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    },
)


@pytest.fixture(name="dino")
def _dino(tmp_path):
    """Return a model whose file holds gate and up projections in one tensor."""
    torch.manual_seed(0)
    model = transformers.Dinov2Model(DINO).eval()
    model.save_pretrained(tmp_path / "dino")
    assert any("weights_in" in name for name in load_file(tmp_path / "dino" / "model.safetensors"))
    return model, tmp_path / "dino"


@pytest.fixture(name="qwen")
def _qwen(tmp_path):
    """Return a mixture of experts whose file holds their matrices transposed, as published ones do."""
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(QWEN).eval()
    folder = tmp_path / "qwen"
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return model, folder


def test_a_part_of_a_tensor_is_read_in_place(dino):
    model, folder = dino
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        wanted = model(x).last_hidden_state
        with blockstream.from_pretrained(folder, arena="230KiB") as streamed:
            assert torch.equal(streamed(x).last_hidden_state, wanted)


def test_the_reference_reads_the_same_part(dino):
    model, folder = dino
    with blockstream.empty():
        module = transformers.Dinov2Model(DINO)
    prepared = Prepared("dino", module, Checkpoint.open(folder), None)
    reference = Reference(prepared)
    for name, value in model.named_parameters():
        assert torch.equal(reference.parameter(name), value), name
    reference.close()


def test_a_packed_part_streams_the_same(dino, tmp_path, capsys):
    model, folder = dino
    assert main(["pack", str(folder), str(tmp_path / "packed")]) == 0
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        wanted = model(x).last_hidden_state
        with blockstream.from_pretrained(tmp_path / "packed", arena="230KiB") as streamed:
            assert torch.equal(streamed(x).last_hidden_state, wanted)


def test_what_takes_arithmetic_is_refused_by_name_and_points_to_pack(qwen):
    _, folder = qwen
    said = r"makes 4 parameters, such as 'model\.language_model\.layers\.0\.mlp.*Transpose.*blockstream pack"
    with pytest.raises(CheckpointError, match=said), blockstream.from_pretrained(folder):
        pass


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_packing_does_the_arithmetic(qwen, tmp_path, capsys, dtype):
    model, folder = qwen
    packed = tmp_path / "packed"
    assert main(["pack", str(folder), str(packed), *(["--dtype", dtype] if dtype else [])]) == 0
    if dtype:
        model = model.bfloat16()
    found = Checkpoint.open(packed)
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.language_model.layers.1.mlp.experts.{name}"
        assert found[path].shape == model.get_parameter(path).shape
    if dtype is None:
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.inference_mode():
            wanted = model(input_ids=ids).logits
            with blockstream.from_pretrained(packed) as streamed:
                assert torch.equal(streamed(input_ids=ids).logits, wanted)


def test_a_pack_that_does_arithmetic_goes_on_after_an_interruption(qwen, tmp_path, capsys):
    _, folder = qwen
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["pack", str(folder), str(whole)]) == 0
    assert main(["pack", str(folder), str(cut)]) == 0
    manifest = json.loads((cut / MANIFEST_NAME).read_text())
    (cut / MANIFEST_NAME).unlink()
    (cut / manifest["segments"][-1]["file"]).unlink()
    manifest["segments"].pop()
    (cut / JOURNAL_NAME).write_text(json.dumps(manifest))
    assert main(["pack", str(folder), str(cut)]) == 0
    assert {p.name: p.read_bytes() for p in cut.iterdir() if p.suffix == ".safetensors"} == {
        p.name: p.read_bytes() for p in whole.iterdir() if p.suffix == ".safetensors"
    }
