"""Every attention of STDiT3, each with a seam where attention transforms act.

Tokens are [B, T, S, C]: frames, then places. Without a transform a layer holds `UNCHANGED` and computes as
if the seam were not there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError
from blockstream.module.attention import UNCHANGED, Kernel, numbered
from blockstream.module.chunks import chunks
from blockstream.plugins import AttentionKind, AttentionLayer

#: cos and sin [T, head_dim / 2] of the frames' angles.
Rope = tuple[Tensor, Tensor]

#: On the CPU torch's fused attention takes some ten times a plain softmax(qk)v to differentiate in 16-bit
#: floats when there are few keys, and is no faster forward; scores this narrow are also cheap to hold.
FEW_KEYS = 32
#: Tokens whose queries, keys and values a self-attention holds at a time, in whole sequences: those of all
#: tokens would be most of what a block needs. Numerics, as `FEW_KEYS`.
ATTENTION_TOKENS = 1024


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, [B, heads, N, D]; `keep` bool [B, 1, 1, keys] hides keys.

    Which of two ways computes it follows from shape, dtype and device alone: it is numerics.
    """
    if q.device.type == "cpu" and q.dtype != torch.float32 and k.shape[-2] <= FEW_KEYS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class Attention(nn.Module):
    """What all attentions share: heads, and the seam around the computation."""

    kind: AttentionKind

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = channels // heads
        self.seam = UNCHANGED

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """Return the attention's result for x [B, T, S, C], on merged tokens while a merge is active."""
        return self.seam.around(x, lambda x, kernel: self.attend(x, kernel, *context))

    def attend(self, x: Tensor, kernel: Kernel | None, *context: Tensor | None) -> Tensor:
        """Return the attention of x [B, T, S, C], whatever T is."""
        raise NotImplementedError

    def heads_first(self, x: Tensor) -> Tensor:
        """Return [B, heads, N, D] of [B, N, C]."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32, then weighted."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, in its dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Return x [..., T, D] turned by rope [T, D/2]: pairs (2k, 2k+1), computed in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


class SelfAttention(Attention):
    """Attention over the places of a frame ("spatial") or the frames of a place ("temporal")."""

    def __init__(self, channels: int, heads: int, kind: AttentionKind, qk_norm: bool = True) -> None:
        super().__init__(channels, heads)
        self.kind = kind
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def attend(
        self,
        x: Tensor,
        kernel: Kernel | None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of x [B, T, S, C]; cos, sin [T, D/2] turn queries and keys."""
        temporal = self.kind == "temporal"
        rows = x.transpose(1, 2) if temporal else x  # [B, S, T, C] or [B, T, S, C]
        sequences = rows.flatten(0, 1)
        apply = attention if kernel is None else kernel
        rope = None if cos is None or sin is None else (cos, sin)
        # A kernel of a plugin is told of all sequences of its layer, and gets them.
        at_once = max(1, ATTENTION_TOKENS // sequences.shape[1]) if kernel is None else len(sequences)
        if len(sequences) <= at_once:
            y = self._some(sequences, rope, apply)
        else:
            y = torch.empty_like(sequences)
            for some in chunks(len(sequences), at_once):
                y[some] = self._some(sequences[some], rope, apply)
        y = y.view(rows.shape)
        return y.transpose(1, 2) if temporal else y

    def _some(
        self, x: Tensor, rope: Rope | None, apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the attention of some sequences [N, tokens, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(self.heads_first(q)), self.k_norm(self.heads_first(k))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = apply(q, k, self.heads_first(v))
        return self.proj(y.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Attention of all tokens to their sample's own text."""

    kind = "cross"

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def attend(
        self,
        x: Tensor,
        kernel: Kernel | None,
        y: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of x [B, T, S, C] to y [B, L, C]; `keep` bool [B, L], None: all."""
        if y is None:
            raise ModelError("cross-attention needs text tokens")
        q = self.heads_first(self.q_linear(x.flatten(1, 2)))
        k, v = (self.heads_first(part) for part in self.kv_linear(y).chunk(2, dim=-1))
        if kernel is None:
            out = attention(q, k, v, None if keep is None else keep[:, None, None])
        else:
            out = kernel(q, k, v, None if keep is None else keep.sum(1).tolist())
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)


def attention_layers(
    model: nn.Module, grid: tuple[int, int, int], text_tokens: int
) -> list[tuple[Attention, AttentionLayer]]:
    """Return each attention of a model with what a transform is told of it, for one run's shapes.

    `grid` (T, H, W) of tokens reach the blocks (`STDiT3.grid` gives it), at most `text_tokens` of text.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    layers = [
        AttentionLayer(
            name=name,
            kind=module.kind,
            grid=grid,
            width=module.heads * module.head_dim,
            heads=module.heads,
            trailing=text_tokens if module.kind == "cross" else 0,
        )
        for name, module in found
    ]
    return list(zip((module for _, module in found), numbered(layers), strict=True))
