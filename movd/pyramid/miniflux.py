"""miniFLUX, the denoiser of Pyramidal Flow, under the keys of rain1011/pyramid-flow-miniflux.

Blocks of two streams, then of one. Video tokens are those of several clips, oldest first, each of its own
resolution; the last is denoised. A token sees what is not later than itself; text stands at time 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.attention import RMSNorm, Rope, rotate
from movd.layers import sinusoid
from movd.official import OfficialConfig


class MiniFluxConfig(OfficialConfig):
    """The official names; the defaults are the released model's."""

    ignored: ClassVar = frozenset(
        {
            "use_flash_attn",
            "use_temporal_causal",
            "interp_condition_pos",
            "use_gradient_checkpointing",
            "gradient_checkpointing_ratio",
        }
    )
    fixed: ClassVar = {"patch_size": 1}

    in_channels: int = Field(default=64, ge=4)
    num_layers: int = Field(default=8, ge=0)
    num_single_layers: int = Field(default=16, ge=0)
    attention_head_dim: int = Field(default=64, ge=2)
    num_attention_heads: int = Field(default=30, ge=1)
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    axes_dims_rope: tuple[int, int, int] = (16, 24, 24)

    @model_validator(mode="before")
    @classmethod
    def _not_another_variant(cls, values: Any) -> Any:
        kind = values.get("_class_name", "PyramidFluxTransformer")
        if kind != "PyramidFluxTransformer":
            raise ConfigError(f"{cls.__name__}: _class_name {kind!r} is not 'PyramidFluxTransformer'")
        return values

    @model_validator(mode="after")
    def _fits(self) -> MiniFluxConfig:
        if self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} must divide by 4: patches are 2 x 2 latents")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(n % 2 for n in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} must be even and add up to attention_head_dim, "
                f"{self.attention_head_dim}"
            )
        return self

    @property
    def width(self) -> int:
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Return the channels of a latent: a patch of 2 x 2 of them makes a token."""
        return self.in_channels // 4


class TwoLayers(nn.Module):
    """Linear, SiLU, Linear under diffusers' names."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out] of x [B, c_in]."""
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class TimeAndText(nn.Module):
    """What modulates every block: the time and the prompt's vector."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(256, channels)
        self.text_embedder = TwoLayers(pooled, channels)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Return [B, C] of timestep [B] in 0..1000 and pooled [B, P]."""
        time = sinusoid(timestep).to(pooled.dtype)
        return self.timestep_embedder(time) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """LayerNorm without weights, then shift and scale of the conditioning; `parts` vectors in all."""

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(channels, parts * channels)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors, each [B, 1, C], of the conditioning t [B, C]."""
        return self.linear(nn.functional.silu(t))[:, None].chunk(self.parts, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift, eps 1e-6."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _Gelu(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear to four times the width, GELU in its tanh form, Linear; keys net.0.proj and net.2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [_Gelu(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, N, C] of x [B, N, C]."""
        return self.net[2](self.net[0](x))


class Geometry(NamedTuple):
    """Where tokens stand and what they see, text first: the same in every block of a pass.

    `rope` cos and sin [N, D / 2]; `keep` bool [B, 1, N, N], True where a row may see a column.
    """

    rope: Rope
    keep: Tensor


class JointAttention(nn.Module):
    """The heads and norms of an attention over text and video; `added`: text has projections of its own."""

    def __init__(self, config: MiniFluxConfig, *, added: bool) -> None:
        super().__init__()
        c, self.heads = config.width, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(config.attention_head_dim) for _ in range(2))
        self.added = added
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(c, c) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (RMSNorm(config.attention_head_dim) for _ in range(2))
            self.to_out = nn.ModuleList([nn.Linear(c, c)])
            self.to_add_out = nn.Linear(c, c)

    def forward(self, x: Tensor, text: Tensor | None, where: Geometry) -> tuple[Tensor, Tensor | None]:
        """Return the results for video x [B, N, C] and text [B, L, C]; without text x holds both."""
        q, k, v = self.norm_q(self._heads(self.to_q(x))), self.norm_k(self._heads(self.to_k(x))), self.to_v(x)
        v = self._heads(v)
        if self.added and text is not None:
            tq = self.norm_added_q(self._heads(self.add_q_proj(text)))
            tk = self.norm_added_k(self._heads(self.add_k_proj(text)))
            tv = self._heads(self.add_v_proj(text))
            q, k, v = torch.cat((tq, q), 2), torch.cat((tk, k), 2), torch.cat((tv, v), 2)
        q, k = rotate(q, where.rope), rotate(k, where.rope)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=where.keep)
        y = y.transpose(1, 2).flatten(2)
        if not self.added or text is None:
            return y, None
        words = text.shape[1]
        return self.to_out[0](y[:, words:]), self.to_add_out(y[:, :words])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DoubleBlock(nn.Module):
    """Video and text, each with its own weights, joined in the attention."""

    def __init__(self, config: MiniFluxConfig) -> None:
        super().__init__()
        c = config.width
        self.norm1, self.norm1_context = Modulation(c, 6), Modulation(c, 6)
        self.attn = JointAttention(config, added=True)
        self.ff, self.ff_context = FeedForward(c), FeedForward(c)

    def forward(self, x: Tensor, text: Tensor, t: Tensor, where: Geometry) -> tuple[Tensor, Tensor]:
        """Return video x [B, N, C] and text [B, L, C] after the block; t [B, C] modulates."""
        shift, scale, gate, shift_m, scale_m, gate_m = self.norm1(t)
        c_shift, c_scale, c_gate, c_shift_m, c_scale_m, c_gate_m = self.norm1_context(t)
        y, c = self.attn(modulated(x, shift, scale), modulated(text, c_shift, c_scale), where)
        x, text = x + gate * y, text + c_gate * c
        x = x + gate_m * self.ff(modulated(x, shift_m, scale_m))
        return x, text + c_gate_m * self.ff_context(modulated(text, c_shift_m, c_scale_m))


class SingleBlock(nn.Module):
    """Text and video as one stream; attention and MLP side by side."""

    def __init__(self, config: MiniFluxConfig) -> None:
        super().__init__()
        c = config.width
        self.norm = Modulation(c, 3)
        self.attn = JointAttention(config, added=False)
        self.proj_mlp = nn.Linear(c, 4 * c)
        self.proj_out = nn.Linear(5 * c, c)

    def forward(self, x: Tensor, t: Tensor, where: Geometry) -> Tensor:
        """Return x [B, L + N, C] after the block."""
        shift, scale, gate = self.norm(t)
        normed = modulated(x, shift, scale)
        hidden = nn.functional.gelu(self.proj_mlp(normed), approximate="tanh")
        y, _ = self.attn(normed, None, where)
        return x + gate * self.proj_out(torch.cat((y, hidden), -1))


class FinalModulation(nn.Module):
    """The last modulation; its linear gives scale, then shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return x [B, N, C] modulated."""
        scale, shift = self.linear(nn.functional.silu(t))[:, None].chunk(2, dim=-1)
        return modulated(x, shift, scale)


class MiniFlux(nn.Module):
    """The denoiser: clips of latents, a time, text -> the velocity of the last clip."""

    def __init__(self, config: MiniFluxConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MiniFluxConfig()
        c = config.width
        self.time_text_embed = TimeAndText(c, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, c)
        self.x_embedder = nn.Linear(config.in_channels, c)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = FinalModulation(c)
        self.proj_out = nn.Linear(c, config.in_channels)

    def stream_order(self) -> tuple[str, ...]:
        """Return the blocks' names in the order one forward runs them."""
        c = self.config
        double = [f"transformer_blocks.{i}" for i in range(c.num_layers)]
        return (*double, *(f"single_transformer_blocks.{i}" for i in range(c.num_single_layers)))

    def forward(
        self, clips: Sequence[Tensor], timestep: Tensor, text: Tensor, mask: Tensor, pooled: Tensor
    ) -> Tensor:
        """Return the velocity [B, c, T, h, w] (noise - data) of the last clip.

        clips [B, c, T, h, w] of growing resolution, even h and w; timestep [B] in 0..1000; text [B, L, J]
        with mask [B, L], pooled [B, P].
        """
        dtype = self.x_embedder.weight.dtype
        t = self.time_text_embed(timestep, pooled.to(dtype))
        where = self.geometry(clips, mask)
        words = text.shape[1]
        y = self.context_embedder(text.to(dtype))
        x = self.x_embedder(torch.cat([patches(clip) for clip in clips], 1).to(dtype))
        for block in self.transformer_blocks:
            x, y = block(x, y, t, where)
        x = torch.cat((y, x), 1)
        for block in self.single_transformer_blocks:
            x = block(x, t, where)
        last = clips[-1]
        tokens = last.shape[2] * (last.shape[3] // 2) * (last.shape[4] // 2)
        x = self.proj_out(self.norm_out(x[:, words:][:, -tokens:], t))
        return unpatched(x, last.shape)

    def geometry(self, clips: Sequence[Tensor], mask: Tensor) -> Geometry:
        """Return where the tokens of text and clips stand, and which may see which."""
        places = torch.cat((torch.zeros(mask.shape[1], 3), positions(clips)))
        angles = [
            places[:, axis, None].double() * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate(self.config.axes_dims_rope)
        ]
        angle = torch.cat(angles, 1)
        device = mask.device
        rope = (angle.cos().float().to(device), angle.sin().float().to(device))
        time = places[:, 0].to(device)
        real = torch.ones(len(mask), len(places), dtype=torch.bool, device=device)
        real[:, : mask.shape[1]] = mask.bool()  # padding sees padding alone
        keep = (real[:, :, None] == real[:, None]) & (time[:, None] >= time)
        return Geometry(rope, keep[:, None])


def positions(clips: Sequence[Tensor]) -> Tensor:
    """Return time, row and column [N, 3] of the clips' tokens.

    Time runs on over the clips. Rows and columns are those of the last clip's grid; a smaller clip's lie
    between them, as a linear interpolation (of pixels' centres) puts them.
    """
    rows, columns = (size // 2 for size in clips[-1].shape[3:])
    start, found = 0, []
    for clip in clips:
        frames, h, w = clip.shape[2], clip.shape[3] // 2, clip.shape[4] // 2
        time = torch.arange(start, start + frames, dtype=torch.float32)
        row, column = _between(rows, h), _between(columns, w)
        found.append(torch.cartesian_prod(time, row, column))
        start += frames
    return torch.cat(found)


def _between(whole: int, n: int) -> Tensor:
    """Return 0 .. whole - 1 at n places."""
    line = torch.arange(whole, dtype=torch.float32)
    return nn.functional.interpolate(line[None, None], n, mode="linear")[0, 0] if n != whole else line


def patches(clip: Tensor) -> Tensor:
    """Return patches [B, T h w, 4 c] of latents [B, c, T, 2h, 2w], each laid out (row, column, c)."""
    b, c, t, h, w = clip.shape
    if h % 2 or w % 2:
        raise ConfigError(f"latents of {h} x {w} have no whole patches of 2 x 2")
    x = clip.reshape(b, c, t, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 3, 5, 4, 6, 1).reshape(b, t * (h // 2) * (w // 2), 4 * c)


def unpatched(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return latents of `shape` [B, c, T, 2h, 2w] of patches [B, T h w, 4 c]."""
    b, c, t, h, w = shape
    x = x.reshape(b, t, h // 2, w // 2, 2, 2, c)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, t, h, w)


def operations(config: MiniFluxConfig, tokens: int, words: int) -> float:
    """Return about how many operations a pass on one sample takes: products of matrices, and scores."""
    c, n = config.width, tokens + words
    double = config.num_layers * (24 * c * c * n + 4 * c * n * n)
    single = config.num_single_layers * (24 * c * c * n + 4 * c * n * n)
    return float(double + single) if math.isfinite(n) else 0.0
