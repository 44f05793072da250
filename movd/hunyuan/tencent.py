"""HunyuanVideo's DiT as Tencent publishes it: its keys read as diffusers', nothing converted.

Queries, keys, values and the MLP's input lie one after another in one tensor; each is read as rows of it. The
final modulation holds shift before scale, diffusers' scale before shift: the module is built to match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.errors import CheckpointError
from movd.renamed import prefix_before, rows

#: A key that only this layout has.
MARK = "img_in.proj.weight"

_PLAIN = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.linear": "norm.linear",
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
#: Layers that hold several of diffusers' layers, in order; in `linear1` the MLP's input is what is left.
_JOINED = {
    "refiner": {"self_attn_qkv": _QKV},
    "double": {
        "img_attn_qkv": _QKV,
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single": {"linear1": (*_QKV, "proj_mlp")},
}
_BLOCKS = (
    (
        "refiner",
        _REFINER,
        r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.",
        "context_embedder.token_refiner.refiner_blocks.{}.",
    ),
    ("double", _DOUBLE, r"double_blocks\.(\d+)\.", "transformer_blocks.{}."),
    ("single", _SINGLE, r"single_blocks\.(\d+)\.", "single_transformer_blocks.{}."),
)


def is_tencents(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has Tencent's keys."""
    return any(name.endswith(MARK) for name in checkpoint.entries)


def diffusers_entries(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint under diffusers' names, joined tensors as parts.

    The module has to be one whose `norm_out` is `ShiftFirst`. Raises CheckpointError for a key that is none
    of the layout's.
    """
    prefix = prefix_before(checkpoint, MARK, ("", "module.", "model."))
    found: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.entries.items():
        for key, part in _named(checkpoint, name.removeprefix(prefix), entry):
            found[key] = part
    return Checkpoint(checkpoint.root, checkpoint.form, found, checkpoint.synthetic)


def _named(checkpoint: Checkpoint, name: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    """Yield diffusers' names of one tensor, and where each one's bytes lie."""
    layer, _, kind = name.rpartition(".")
    if layer in _PLAIN:
        yield f"{_PLAIN[layer]}.{kind}", entry
        return
    for what, table, pattern, form in _BLOCKS:
        match = re.match(pattern, name)
        if match is None:
            continue
        own, head = layer[match.end() :], form.format(match[1])
        if own in table:
            yield f"{head}{table[own]}.{kind}", entry
            return
        if own in _JOINED[what]:
            for target, part in _parts(
                entry, _JOINED[what][own], _width(entry, what, kind, checkpoint, name)
            ):
                yield f"{head}{target}.{kind}", part
            return
    raise CheckpointError(
        f"{checkpoint.root}: {name!r} is no key of HunyuanVideo's text-to-video DiT in Tencent's layout; is "
        "this another of its models?"
    )


def _width(entry: TensorEntry, what: str, kind: str, checkpoint: Checkpoint, name: str) -> int:
    """Return the rows of one of the joined layers: the model's width."""
    if what != "single":
        return entry.shape[0] // 3
    if kind == "weight":
        return entry.shape[1]
    return _width(checkpoint[name.removesuffix(kind) + "weight"], what, "weight", checkpoint, name)


def _parts(entry: TensorEntry, targets: tuple[str, ...], width: int) -> Iterator[tuple[str, TensorEntry]]:
    for i, target in enumerate(targets):
        yield target, rows(entry, i * width, (i + 1) * width if i < 3 else entry.shape[0])


class ShiftFirst(nn.Module):
    """The final modulation in Tencent's order: its linear gives shift, then scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Return LayerNorm(x) * (1 + scale) + shift for x [B, N, C], conditioning [B, C]."""
        m = self.linear(nn.functional.silu(conditioning).to(x.dtype))
        shift, scale = m.chunk(2, dim=1)
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return normed * (1 + scale)[:, None] + shift[:, None]
