"""Single files with their authors' keys: read in place by what diffusers' own converters do to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import blockstream
from benchmarks.zoo.models import DIFFUSERS
from blockstream.checkpoint import Checkpoint, FileStamp, TensorEntry
from blockstream.errors import CheckpointError
from blockstream.module.original_keys import Piece, Traced, original_match
from tests.support.gguf_files import write
from tests.support.models import aligned

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

#: Names of Wan's layers, diffusers' and its authors'.
WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn2": "cross_attn", "attn1": "self_attn", ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.",
    ".to_v.": ".v.", "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "norm2": "norm-3", "norm3": "norm2", "norm-3": "norm3",
}  # fmt: skip


def wan_name(name):
    if name.endswith("scale_shift_table"):
        return "head.modulation" if "." not in name else name.replace("scale_shift_table", "modulation")
    for ours, theirs in WAN.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture
def wan(tmp_path):
    """Return a small Wan, and its file as its authors would name its tensors."""
    torch.manual_seed(0)
    module = DIFFUSERS["WanTransformer3DModel"].make().eval()
    held = {f"model.diffusion_model.{wan_name(k)}": v.clone() for k, v in module.state_dict().items()}
    save_file(held, tmp_path / "wan.safetensors")
    settings = {**module.config, "_class_name": "WanTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(settings, default=str))
    return aligned(module), tmp_path / "wan.safetensors"


def test_a_single_file_of_its_authors_keys_streams_with_the_same_bits(wan):
    module, file = wan
    inputs = DIFFUSERS["WanTransformer3DModel"].inputs(torch.float32)
    with torch.no_grad(), blockstream.from_pretrained(file, arena="1MiB") as streamed:
        assert torch.equal(streamed(**inputs)[0], module(**inputs)[0])


def test_what_a_converter_computes_is_refused_with_a_way_out(wan, monkeypatch):
    from diffusers.loaders import single_file_model

    row = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]
    convert = row["checkpoint_mapping_fn"]

    def doubling(checkpoint, **kwargs):
        return {k: v * 2 if "to_q" in k else v for k, v in convert(checkpoint).items()}

    monkeypatch.setitem(row, "checkpoint_mapping_fn", doubling)
    said = r"computes \d+ parameters of WanTransformer3DModel.*to_q.* by mul.*from_single_file\(FILE\)"
    with pytest.raises(CheckpointError, match=said), blockstream.from_pretrained(wan[1], arena="1MiB"):
        pass


def flux_spec(d=3072):
    """Return the names and shapes of Flux's own file, with one block of either kind."""
    spec = {"img_in.weight": (d, 64), "txt_in.weight": (d, 4096), "final_layer.linear.weight": (64, d)}
    spec["final_layer.adaLN_modulation.1.weight"] = (2 * d, d)
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        spec |= {f"{name}.in_layer.weight": (d, width), f"{name}.out_layer.weight": (d, d)}
    for name in ("img", "txt"):
        part = f"double_blocks.0.{name}_"
        spec |= {
            part + "mod.lin.weight": (6 * d, d), part + "attn.qkv.weight": (3 * d, d),
            part + "attn.proj.weight": (d, d), part + "mlp.0.weight": (4 * d, d),
            part + "mlp.2.weight": (d, 4 * d),
        }  # fmt: skip
    one = "single_blocks.0."
    spec |= {one + "linear1.weight": (7 * d, d), one + "linear2.weight": (d, 5 * d)}
    spec[one + "modulation.lin.weight"] = (3 * d, d)
    spec |= {name.replace("weight", "bias"): shape[:1] for name, shape in spec.items()}
    for part in ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", one):
        spec |= {f"{part}norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    return spec


def test_cut_and_joined_tensors_are_read_as_rows_of_the_file():
    stamp, entries, at = FileStamp(Path("/flux"), 1 << 40, 0, 0, 0, ""), {}, 0
    for name, shape in flux_spec().items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = TensorEntry(name, "BF16", shape, stamp, at, nbytes)
        at += nbytes
    with blockstream.empty():
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    found = original_match(flux, Checkpoint(Path("/flux"), "raw", entries), set(flux.state_dict()))
    assert found.keys() == flux.state_dict().keys()
    whole = entries["single_blocks.0.linear1.weight"]
    (mlp,) = found["single_transformer_blocks.0.proj_mlp.weight"].tensors
    assert (mlp.shape, mlp.offset) == ((12288, 3072), whole.offset + 3 * 3072 * 3072 * 2)
    scale, shift = found["norm_out.linear.weight"].tensors  # the authors' have them the other way round
    last = entries["final_layer.adaLN_modulation.1.weight"]
    assert (scale.offset, shift.offset) == (last.offset + last.nbytes // 2, last.offset)


def test_operations_keep_or_lose_the_way_to_the_bytes():
    entry = TensorEntry("a", "F32", (6, 4, 1, 1), FileStamp(Path("/a"), 1, 0, 0, 0, ""), 0, 96)
    a = Traced.of(torch.empty(6, 4, 1, 1), (Piece(entry, 0, 24),))
    flat = a[:, :, 0, 0]
    assert flat.shape == (6, 4) and flat.pieces == (Piece(entry, 0, 24),)
    assert flat[2:4].pieces == (Piece(entry, 8, 8),) and flat[-1].pieces == (Piece(entry, 20, 4),)
    assert [x.pieces[0][1:] for x in flat.chunk(3)] == [(0, 8), (8, 8), (16, 8)]
    assert torch.cat([flat[3:], flat[:3]]).pieces == (Piece(entry, 12, 12), Piece(entry, 0, 12))
    for lost in (flat.t(), flat[:, 1:], flat + 1, torch.cat([flat, flat], 1), flat.half(), flat[::2]):
        assert lost.pieces is None and lost.by


def test_a_gguf_file_of_its_authors_keys_is_widened_layer_by_layer(tmp_path):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    tensors = {}
    for name, value in module.state_dict().items():
        is_matrix = value.dim() == 2 and "attn" in name and name.endswith("weight") and "norm" not in name
        tensors[wan_name(name)] = ("Q8_0", tuple(value.shape)) if is_matrix else value.numpy()
    file = write(tmp_path / "wan.Q8_0.gguf", "wan", {}, tensors)
    settings = {**module.config, "_class_name": "WanTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(settings, default=str))
    for tensor in gguf.GGUFReader(file).tensors:
        name = next(k for k in module.state_dict() if wan_name(k) == tensor.name)
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        module.state_dict()[name].copy_(numbers.view(module.state_dict()[name].shape))
    inputs = {
        "hidden_states": torch.ones(1, 16, 1, 4, 4), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.ones(1, 5, 32),
    }  # fmt: skip
    aligned(module)
    with torch.no_grad(), blockstream.from_pretrained(file, arena="1MiB", dtype="fp32") as streamed:
        assert torch.equal(streamed(**inputs)[0], module(**inputs)[0])
