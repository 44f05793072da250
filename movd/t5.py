"""The text encoder: T5's encoder with the modules, names and bits of transformers' `T5EncoderModel`.

It is written out here because importing transformers takes several seconds of processor. Attention is plain;
nothing is dropped, as nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.released import T5_V1_1_XXL
from movd.tokenizer import Tokenizer

_NEEDED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def gelu_new(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, term by term as T5 v1.1 has it: the kernel rounds otherwise."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


#: What `feed_forward_proj` may name, after "gated-" where a layer is gated; "gated-gelu" means `gelu_new`.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_new": gelu_new,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True)
class T5Config:
    """The fields of a T5's config.json that the encoder follows from; defaults are the library's."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def is_gated_act(self) -> bool:
        """Return whether the feed-forward layer multiplies its activation with a second product."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def dense_act_fn(self) -> str:
        """Return the name of the activation; see `ACTIVATIONS`."""
        named = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else named


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the config.json of another model than T5."""
    kind = config.get("model_type", "t5")
    if kind != "t5":
        raise ConfigError(f"model_type {kind!r} is not 't5'; Open-Sora v1.2 uses DeepFloyd/t5-v1_1-xxl")
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ConfigError(f"a T5 configuration needs {missing}")
    if (named := _config(config).dense_act_fn) not in ACTIVATIONS:
        raise ConfigError(
            f"feed_forward_proj {config['feed_forward_proj']!r}: {named!r} is none of {[*ACTIVATIONS]}"
        )


def _config(config: Mapping[str, Any]) -> T5Config:
    return T5Config(**{f.name: config[f.name] for f in fields(T5Config) if f.name in config})


def t5_encoder(config: Mapping[str, Any]) -> T5Encoder:
    """Build the encoder of a config.json, in eval mode.

    Build it under `torch.device("meta")` to spend no memory. Raises ConfigError for another model.
    """
    check_config(config)
    return T5Encoder(_config(config)).eval()


@dataclass
class Encoded:
    """What the encoder returns: [B, L, d_model]."""

    last_hidden_state: Tensor


class Norm(nn.Module):
    """Root mean square over the last axis, summed in float32, then weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., C] normalised, in the weight's dtype where that is a half."""
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Attention(nn.Module):
    """Attention without a scale, with a bias for relative positions that the first block owns."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.config = config
        self.n_heads, self.key_value_proj_dim = config.num_heads, config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def compute_bias(self, queries: int, keys: int) -> Tensor:
        """Return what is added to the scores of all blocks, [1, heads, queries, keys]."""
        where = self.relative_attention_bias.weight.device
        positions = torch.arange(keys, device=where) - torch.arange(queries, device=where)[:, None]
        bias: Tensor = self.relative_attention_bias(self._buckets(positions))
        return bias.permute(2, 0, 1)[None]

    def _buckets(self, positions: Tensor) -> Tensor:
        """Return the bucket of each distance: near ones have one each, farther ones share, by logarithm."""
        half = self.config.relative_attention_num_buckets // 2
        exact, most = half // 2, self.config.relative_attention_max_distance
        after = (positions > 0).to(torch.long) * half
        distance = positions.abs()
        far = torch.log(distance.float() / exact) / math.log(most / exact) * (half - exact)
        shared = (exact + far.to(torch.long)).clamp(max=half - 1)
        return after + torch.where(distance < exact, distance, shared)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, L, C] of x [B, L, C]."""
        q, k, v = (self._heads(part(x)) for part in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(2, 3)) + bias
        if mask is not None:
            scores = scores + mask
        y = torch.matmul(nn.functional.softmax(scores, dim=-1), v)
        out: Tensor = self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.key_value_proj_dim).transpose(1, 2)


class SelfAttention(nn.Module):
    """A norm, attention, and what came in."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, has_bias)
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x after attention, and the bias: computed here where there is none."""
        normed = self.layer_norm(x)
        if bias is None:
            bias = self.SelfAttention.compute_bias(x.shape[1], x.shape[1])
        return x + self.SelfAttention(normed, bias, mask), bias


class Dense(nn.Module):
    """Two products with an activation between them, gated by a third where the config says so."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.is_gated, self.act = config.is_gated_act, ACTIVATIONS[config.dense_act_fn]
        for name in ("wi_0", "wi_1") if self.is_gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, C] of x [B, L, C]."""
        hidden = self.act(self.wi_0(x)) * self.wi_1(x) if self.is_gated else self.act(self.wi(x))
        if self.wo.weight.dtype.is_floating_point:  # float32 in a model of float16
            hidden = hidden.to(self.wo.weight.dtype)
        out: Tensor = self.wo(hidden)
        return out


class FeedForward(nn.Module):
    """A norm, the dense layers, and what came in."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = Dense(config)
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, C] of x [B, L, C]."""
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class Block(nn.Module):
    """Attention and the feed-forward layer; the first also makes the bias of all."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((SelfAttention(config, has_bias), FeedForward(config)))

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x [B, L, C] after the block, and the bias."""
        x, bias = self.layer[0](x, bias, mask)
        x = _clamped(self.layer[1](_clamped(x)))
        return x, bias


def _clamped(x: Tensor) -> Tensor:
    """Return x within what float16 holds, where it is that: a sum of large channels may overflow."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), most - 1000, most)
    return torch.clamp(x, min=-limit, max=limit)


class Stack(nn.Module):
    """The table of tokens, the blocks, the last norm."""

    def __init__(self, config: T5Config, table: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = table
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, L, C] of ids [B, L]."""
        x = self.embed_tokens(ids)
        hidden = None
        if mask is not None:  # 0 for what is attended to, the least number for padding
            seen = mask[:, None, None].to(torch.bool)
            hidden = torch.where(seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        bias = None
        for block in self.block:
            x, bias = block(x, bias, hidden)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5Encoder(nn.Module):
    """The whole encoder; its one table has two names, as in published checkpoints."""

    #: In float16 the sums of the last product of a block overflow.
    _keep_in_fp32_modules = ("wo",)

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Return the last hidden state of ids [B, L]; mask [B, L] is 1 for tokens that are attended to."""
        return Encoded(self.encoder(input_ids, attention_mask))


@torch.no_grad()
def embed(
    model: T5Encoder, tokenizer: Tokenizer, texts: Sequence[str], device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return y [B, 1, L, d_model] and mask [B, L]: every position, padding included, and which are real."""
    ids, mask = (tensor.to(device) for tensor in tokenizer.encode(texts))
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[:, None], mask


__all__ = ["T5_V1_1_XXL", "T5Encoder", "check_config", "embed", "t5_encoder"]
