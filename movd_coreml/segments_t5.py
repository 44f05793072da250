"""T5's encoder in segments: the bias of all attentions, blocks of one signature, the last norm.

The token embedding stays outside: rows are gathered from a table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError
from movd_coreml.segments import HIDDEN, Function, Recipe, StageRecipe, tensor

STAGE = "t5"
#: The parameter whose rows are the table of tokens.
EMBEDDING = "shared.weight"


def t5_stage(encoder: Any, tokens: int) -> StageRecipe:
    """Return the stage of movd's T5 encoder for texts of `tokens` tokens.

    Inputs: x [1, tokens, d_model], the tokens' rows of the embedding; mask [1, tokens], 1 for real ones.
    Output: x, the encoder's last hidden state.
    """
    config, stack = encoder.config, encoder.encoder
    if config.dense_act_fn != "gelu_new" or not config.is_gated_act:
        raise ModelError(
            f"a T5 with feed_forward_proj {config.feed_forward_proj!r} is not exported; "
            "T5 v1.1's is gated-gelu"
        )
    x = tensor("x", (1, tokens, config.d_model))
    mask = tensor("mask", (1, tokens))
    bias = tensor("bias", (1, config.num_heads, tokens, tokens))
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"

    def recipe(name: str, modules: tuple[str, ...], function: Function) -> Recipe:
        return Recipe(f"t5.{name}", STAGE, "t5", modules, (function,))

    segments = [recipe("bias", (first,), Function("main", (mask,), ("bias",), partial(Bias, stack, tokens)))]
    for i, block in enumerate(stack.block):
        # Block 0 also owns the bias, which its package does not hold.
        own = (f"encoder.block.{i}",) if i else tuple(f"encoder.block.0.{part}" for part in _WITHOUT_BIAS)
        function = Function("main", (x, bias), ("x",), partial(Block, block))
        segments.append(recipe(f"block.{i:02}", own, function))
    norm = Function("main", (x,), ("x",), partial(Norm, stack.final_layer_norm))
    segments.append(recipe("norm", ("encoder.final_layer_norm",), norm))
    return StageRecipe(STAGE, tuple(segments), ("x", "mask"), "x")


_WITHOUT_BIAS = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    "layer.0.layer_norm",
    "layer.1",
)


class Norm(nn.Module):
    """T5's norm: root mean square over the last axis, then weights."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., C] normalised."""
        return self.norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Bias(nn.Module):
    """What is added to every attention's scores: relative positions, and padding hidden."""

    def __init__(self, stack: Any, tokens: int) -> None:
        super().__init__()
        attention = stack.block[0].layer[0].SelfAttention
        self.register_buffer("positions", attention.compute_bias(tokens, tokens).detach())

    def forward(self, mask: Tensor) -> Tensor:
        """Return [1, heads, L, L] of mask [1, L], 1 for real tokens and 0 for padding."""
        return self.positions + ((1 - mask) * HIDDEN)[:, None, None]


class Block(nn.Module):
    """Self-attention with an additive bias and no scale, then the gated feed-forward."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, dense = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        self.heads, self.size = attention.n_heads, attention.key_value_proj_dim
        self.norm1, self.norm2 = Norm(block.layer[0].layer_norm), Norm(block.layer[1].layer_norm)
        self.q, self.k, self.v, self.o = attention.q, attention.k, attention.v, attention.o
        self.wi_0, self.wi_1, self.wo = dense.wi_0, dense.wi_1, dense.wo

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return x [1, L, C] after the block; bias [1, heads, L, L]."""
        h = self.norm1(x)
        q, k, v = (self._heads(part(h)) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.wo(nn.functional.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)
