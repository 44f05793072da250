"""STDiT3, the denoiser of Open-Sora v1.2, under the keys of hpcai-tech/OpenSora-STDiT-v3.

Spatial and temporal blocks alternate. Only a block reads its own weights, so that blocks can be streamed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from blockstream.errors import ConfigError
from blockstream.plugins import AttentionKind
from movd.attention import CrossAttention, SelfAttention
from movd.layers import (
    CaptionEmbedder,
    Mlp,
    PatchEmbed3D,
    ScalarEmbedder,
    TemporalRope,
    modulate,
    per_frame,
    position_table,
)
from movd.official import OfficialConfig


class STDiT3Config(OfficialConfig):
    """STDiT3's official names; the defaults are STDiT3-XL/2, the released model."""

    ignored: ClassVar = frozenset(
        {
            "input_size",
            "drop_path",
            "enable_flash_attn",
            "enable_layernorm_kernel",
            "enable_sequence_parallelism",
            "freeze_y_embedder",
            "only_train_temporal",
            "merge_steps",
        }
    )
    fixed: ClassVar = {"skip_y_embedder": False}

    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = Field(default=1152, ge=4)
    depth: int = Field(default=28, ge=1)
    num_heads: int = Field(default=16, ge=1)
    mlp_ratio: float = 4.0
    class_dropout_prob: float = Field(default=0.1, ge=0, le=1)
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = Field(default=300, ge=1)
    qk_norm: bool = True

    @model_validator(mode="before")
    @classmethod
    def _not_another_variant(cls, values: Any) -> Any:
        kind = str(values.get("model_type") or values.get("type") or "STDiT3").lower()
        if not kind.startswith("stdit3"):
            raise ConfigError(
                f"{cls.__name__}: this is a configuration of {kind!r}; only STDiT3 "
                "(Open-Sora v1.2, hpcai-tech/OpenSora-STDiT-v3) is built here"
            )
        return values

    @classmethod
    def refuse(cls, key: str) -> None:
        """Raise for an unknown key; those of STDiT and STDiT2 are told apart."""
        if key in ("no_temporal_pos_emb", "space_scale", "time_scale", "freeze"):
            raise ConfigError(f"{cls.__name__}: {key!r} belongs to STDiT or STDiT2, not to STDiT3")
        super().refuse(key)

    @model_validator(mode="after")
    def _widths_divide(self) -> STDiT3Config:
        if self.hidden_size % 4 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by 4 and by twice num_heads, {self.num_heads}"
            )
        return self

    @property
    def out_channels(self) -> int:
        """Return the channels predicted: velocity, then as many (unused) sigmas if `pred_sigma`."""
        return self.in_channels * (2 if self.pred_sigma else 1)


class STDiT3Block(nn.Module):
    """Self-attention (spatial or temporal), cross-attention to the text, MLP."""

    def __init__(self, config: STDiT3Config, kind: AttentionKind) -> None:
        super().__init__()
        c = config.hidden_size
        self.attn = SelfAttention(c, config.num_heads, kind, config.qk_norm)
        self.cross_attn = CrossAttention(c, config.num_heads)
        self.mlp = Mlp(c, int(c * config.mlp_ratio), c)
        self.scale_shift_table = nn.Parameter(torch.randn(6, c) / c**0.5)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        keep: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return x [B, T, S, C] after one block.

        t [B, T or 1, 6C] modulates, per frame or all alike; y [B, L, C] is the text, `keep` bool [B, L] its
        tokens where samples differ in length; cos, sin [T, D/2] turn a temporal block's queries and keys.
        """
        table = self.scale_shift_table.to(x.dtype)
        m = table + t.unflatten(-1, table.shape)  # [B, T or 1, 6, C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m[:, :, :, None].unbind(2)
        x = x + gate_a * self.attn(modulate(x, shift_a, scale_a), cos, sin)
        x = x + self.cross_attn(x, y, keep)
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """The last modulation and the projection to patches."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        c = config.hidden_size
        self.linear = nn.Linear(c, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, c) / c**0.5)

    def forward(self, x: Tensor, t: Tensor, t0: Tensor | None = None, x_mask: Tensor | None = None) -> Tensor:
        """Return patches [B, T, S, n] of x [B, T, S, C]; t, t0 [B, C], x_mask bool [B, T].

        Known frames are modulated twice, by t and then by t0, as the original's code does and
        as the released weights were trained.
        """
        u = self.modulated(x, t)
        if t0 is not None and x_mask is not None:
            u = torch.where(x_mask[:, :, None, None], u, self.modulated(u, t0))
        return self.linear(u)

    def modulated(self, x: Tensor, t: Tensor) -> Tensor:
        """Return x [B, T, S, C] shifted and scaled by the table and by t [B, C]."""
        m = self.scale_shift_table.to(x.dtype) + t[:, None]
        shift, scale = m[:, None, None].unbind(3)
        return modulate(x, shift, scale)


class STDiT3(nn.Module):
    """The denoiser: latents, a time, text -> velocity (and unused sigmas)."""

    def __init__(self, config: STDiT3Config | None = None) -> None:
        super().__init__()
        self.config = config = config or STDiT3Config()
        c = config.hidden_size
        self.rope = TemporalRope(c // config.num_heads)
        self.x_embedder = PatchEmbed3D(config.in_channels, c, config.patch_size)
        self.t_embedder = ScalarEmbedder(c)
        self.fps_embedder = ScalarEmbedder(c)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, c, config.model_max_length, config.class_dropout_prob
        )
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, "spatial") for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, "temporal") for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Start as the identity: every cross-attention, temporal block and the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        small = [self.t_embedder.mlp, self.fps_embedder.mlp, self.t_block, self.y_embedder]
        for module in small:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        zero = [self.final_layer.linear]
        zero += [block.cross_attn.proj for block in [*self.spatial_blocks, *self.temporal_blocks]]
        zero += [block.attn.proj for block in self.temporal_blocks]
        zero += [block.mlp.fc2 for block in self.temporal_blocks]
        for layer in zero:
            nn.init.zeros_(layer.weight)

    def stream_order(self) -> tuple[str, ...]:
        """Return the blocks' names in the order one forward runs them."""
        pairs = [(f"spatial_blocks.{i}", f"temporal_blocks.{i}") for i in range(self.config.depth)]
        return tuple(name for pair in pairs for name in pair)

    def grid(self, T: int, H: int, W: int) -> tuple[int, int, int]:
        """Return the tokens along time, height and width of latents [T, H, W]."""
        t, h, w = (-(-n // p) for n, p in zip((T, H, W), self.config.patch_size, strict=True))
        return t, h, w

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> Tensor:
        """Return [B, out_channels, T, H, W] float32: velocity = data - noise, then sigmas.

        x [B, c, T, H, W] latents; timestep [B] in 0..1000; y [B, 1, L, caption] text and mask [n, L] its kept
        tokens, rows repeated over the batch; x_mask bool [B, T] True where a frame is denoised, False where
        it is known; fps [B or 1]; height, width [B or 1] in pixels, of which the first is read.
        Raises ValueError if fps or a size is missing.
        """
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps [B or 1], height and width [B or 1] in pixels")
        dtype = self.x_embedder.proj.weight.dtype
        x, y = x.to(dtype), y.to(dtype)
        size = x.shape[2:]
        fps_embedding = self.fps_embedder(fps.repeat(len(x) // len(fps)))
        t = self.t_embedder(timestep) + fps_embedding
        m, t0 = self.t_block(t)[:, None], None
        if x_mask is not None:
            x_mask = x_mask.to(x.device, torch.bool)
            t0 = self.t_embedder(torch.zeros_like(timestep)) + fps_embedding
            m = per_frame(x_mask, m[:, 0], self.t_block(t0))
        text, keep = self.text(y, mask)
        x = self.x_embedder(x)
        x = x + self.position_table(self.grid(*size), float(height[0]), float(width[0])).to(x)
        x = self.blocks(x, m, text, keep)
        x = self.final_layer(x, t, t0, x_mask)
        return self.unpatchify(x, size).float()

    def blocks(self, x: Tensor, m: Tensor, text: Tensor, keep: Tensor | None) -> Tensor:
        """Return x [B, T, S, C] after all blocks."""
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, m, text, keep)
            merge = temporal.attn.seam.merging()
            turned = (cos, sin) if merge is None else self.rope(merge.positions)
            x = temporal(x, m, text, keep, *turned)
        return x

    def text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the kept text tokens [B, L, C] and, where samples differ in number, which are real.

        Raises ValueError for a sample without a token.
        """
        y = self.y_embedder(y).squeeze(1)
        if mask is None:
            return y, None
        kept = mask.to(y.device).ne(0).repeat(len(y) // len(mask), 1)
        lengths = kept.sum(1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest == 0:
            raise ValueError(f"mask keeps no text token of sample {int(lengths.argmin())}")
        order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        y = y.gather(1, order[:, :, None].expand(-1, -1, y.shape[-1]))
        if shortest == longest:
            return y, None
        return y, torch.arange(longest, device=y.device) < lengths[:, None]

    def position_table(self, grid: tuple[int, int, int], height: float, width: float) -> Tensor:
        """Return the table [S, C] added to every frame, for a grid of patches and a size in pixels."""
        scale = math.sqrt(height * width) / self.config.input_sq_size
        _, rows, columns = grid
        base = round(math.sqrt(rows * columns))
        return position_table(self.config.hidden_size, rows, columns, scale, base)

    def unpatchify(self, x: Tensor, size: torch.Size) -> Tensor:
        """Return [B, c, T, H, W] of patches [B, T', S, n], each laid out (t, h, w, c); padding is cut."""
        (t, h, w), (pt, ph, pw) = self.grid(*size), self.config.patch_size
        c = self.config.out_channels
        # One axis at a time keeps every view at rank 5.
        x = x.reshape(-1, t, h * w, pt, ph * pw * c).transpose(2, 3)
        x = x.reshape(-1, h, w, ph, pw * c).transpose(2, 3)
        x = x.reshape(-1, t * pt, h * ph, w * pw, c).permute(0, 4, 1, 2, 3)
        return x[:, :, : size[0], : size[1], : size[2]]


#: hpcai-tech/OpenSora-STDiT-v3: 1.21 B parameters.
STDIT3_XL_2 = STDiT3Config()
