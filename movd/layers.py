"""The layers of STDiT3 beside its attention: embedders, MLP, modulation, tables of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from blockstream.module.chunks import chunks
from movd.attention import Rope


def sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """Return [cos, sin] of t [N] at dim/2 falling frequencies, [N, dim] float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat((angle.cos(), angle.sin()), -1)


class ScalarEmbedder(nn.Module):
    """Embeds one number a sample: a timestep in 0..1000, frames a second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        """Return [N, C] of t [N]."""
        return self.mlp(sinusoid(t).to(self.mlp[0].weight.dtype))


#: Tokens an MLP takes at a time, so that its hidden layer, four times as wide, is never held whole. Numerics:
#: a product of fewer rows may round differently, and the shape alone decides.
MLP_TOKENS = 1024


class Mlp(nn.Module):
    """fc1, GELU in its tanh form, fc2."""

    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c_in, hidden)
        self.fc2 = nn.Linear(hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., c_out] of x [..., c_in]."""
        tokens = x.flatten(0, -2)
        if len(tokens) <= MLP_TOKENS:
            return self._some(x)
        y = tokens.new_empty(len(tokens), self.fc2.out_features)
        for some in chunks(len(tokens), MLP_TOKENS):
            y[some] = self._some(tokens[some])
        return y.view(*x.shape[:-1], -1)

    def _some(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects the text encoder's output; holds the learned caption of the unconditional half."""

    def __init__(self, channels: int, hidden: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.y_proj = Mlp(channels, hidden, hidden)
        null = torch.randn(max_length, channels) / channels**0.5
        self.register_buffer("y_embedding", null)

    def forward(self, y: Tensor) -> Tensor:
        """Return [B, 1, L, C] of y [B, 1, L, caption]; in training captions drop out to the null one."""
        if self.training and self.dropout > 0:
            drop = torch.rand(len(y), 1, 1, 1, device=y.device) < self.dropout
            y = torch.where(drop, self.y_embedding.to(y.dtype), y)
        return self.y_proj(y)


class PatchEmbed3D(nn.Module):
    """Cuts latents into patches, zero-padding the end of each axis to whole ones."""

    def __init__(self, c_in: int, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(c_in, channels, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, T, S, C] of x [B, c, T, H, W]."""
        pads = [-size % p for size, p in zip(x.shape[2:], self.patch, strict=True)]
        x = nn.functional.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]))
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class TemporalRope(nn.Module):
    """Rotary angles of frames; `freqs` [head_dim / 2] is one buffer for the whole model."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("freqs", 10000.0**-exponent)

    def forward(self, positions: Tensor) -> Rope:
        """Return cos and sin [T, head_dim / 2] of frame positions [T], which may be fractional."""
        angle = positions.to(self.freqs.device, torch.float32)[:, None] * self.freqs.float()
        return angle.cos(), angle.sin()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift; the norm has no weights, eps 1e-6."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def per_frame(x_mask: Tensor, t: Tensor, t0: Tensor) -> Tensor:
    """Return [B, T, N]: t [B, N] in the frames being denoised, t0 [B, N] in the known ones."""
    return torch.where(x_mask[:, :, None], t[:, None], t0[:, None])


def position_table(channels: int, rows: int, columns: int, scale: float, base: int) -> Tensor:
    """Return [rows * columns, C]: sin and cos of the column's place, then of the row's, float32.

    Places are stretched so that a table of `base` patches a side at `scale` covers the grid.
    """
    quarter = channels // 4
    inv = 10000.0 ** (-2.0 * torch.arange(quarter, dtype=torch.float32) / (channels // 2))

    def waves(n: int) -> Tensor:
        place = torch.arange(n, dtype=torch.float32) / scale * base / n
        angle = place[:, None] * inv
        return torch.cat((angle.sin(), angle.cos()), -1)

    across = waves(columns)[None].expand(rows, -1, -1)
    down = waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((across, down), -1).flatten(0, 1)
