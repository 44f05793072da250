"""Pyramidal Flow's causal video VAE, under the keys of rain1011/pyramid-flow-miniflux causal_video_vae/.

Norms and attention see one frame, convolutions no later one: a clip decoded in chunks, each convolution
keeping the last two frames it was given, equals the clip decoded whole. Tensors are [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.official import OfficialConfig
from movd.tiled import Along, Tiling, in_space


class CausalVAEConfig(OfficialConfig):
    """The official names; the defaults are the released model's."""

    ignored: ClassVar = frozenset({"scaling_factor", "downsample_scale", "interpolate", "use_tiling"})
    fixed: ClassVar = {
        "encoder_act_fn": "silu",
        "decoder_act_fn": "silu",
        "encoder_double_z": True,
        "encoder_block_dropout": (0.0, 0.0, 0.0, 0.0),
        "decoder_block_dropout": (0.0, 0.0, 0.0, 0.0),
        "encoder_type": "causal_vae_conv",
        "decoder_type": "causal_vae_conv",
        "add_post_quant_conv": True,
    }

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_norm_num_groups: int = 32
    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_norm_num_groups: int = 32

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        kind = values.get("_class_name", "CausalVideoVAE")
        if kind != "CausalVideoVAE":
            raise ConfigError(f"{cls.__name__}: _class_name {kind!r} is not 'CausalVideoVAE'")
        dropout = ("encoder_block_dropout", "decoder_block_dropout")
        kinds = ("down_block_types", "up_block_types", "encoder_block_type", "decoder_block_type")
        return {
            key: tuple(value) if key in dropout else value
            for key, value in values.items()
            if not key.endswith(kinds)
        }

    @property
    def space_factor(self) -> int:
        """Return how many pixels, each way, one latent stands for."""
        return 2 ** sum(self.decoder_spatial_up_sample)

    @property
    def time_factor(self) -> int:
        """Return how many frames one latent stands for, all but the first."""
        return 2 ** sum(self.decoder_temporal_up_sample)


class CausalConv(nn.Module):
    """A 3-D convolution that sees no later frame: zeros around, and in front what it kept, else zeros.

    While `remember` is set it keeps the end of its padded input for the next call.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, time: int = 1, space: int = 1) -> None:
        super().__init__()
        side = kernel // 2
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride=(time, space, space), padding=(0, side, side))
        self.front, self.keeps = kernel - 1, kernel - time
        self.remember = False
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x [B, C, T, H, W]."""
        if self.front:
            if self.kept is None:
                x = nn.functional.pad(x, (0, 0, 0, 0, self.front, 0))
            else:
                x = torch.cat((self.kept, x), 2)
            if self.remember:
                self.kept = x[:, :, x.shape[2] - self.keeps :].clone()
        return self.conv(x)

    @property
    def is_first(self) -> bool:
        """Return whether nothing has been kept: the next call begins the clip."""
        return self.kept is None


class FrameNorm(nn.GroupNorm):
    """Group norm of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, T, H, W] normalised."""
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        return super().forward(frames).reshape(b, t, c, h, w).transpose(1, 2)


class CausalResBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(groups, c_in, eps=1e-6), CausalConv(c_in, c_out)
        self.norm2, self.conv2 = FrameNorm(groups, c_out, eps=1e-6), CausalConv(c_out, c_out)
        self.widens = c_in != c_out
        if self.widens:
            self.conv_shortcut = CausalConv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, c_out, T, H, W]."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.widens else x)


class FrameAttention(nn.Module):
    """One head over the places of each frame, beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return frames x [N, C, H, W] after the attention."""
        places = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(places)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


class CausalMid(nn.Module):
    """Two res blocks round an attention."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])
        self.resnets = nn.ModuleList(CausalResBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, T, H, W] after the block."""
        x = self.resnets[0](x)
        b, c, t, h, w = x.shape
        frames = self.attentions[0](x.transpose(1, 2).reshape(b * t, c, h, w))
        return self.resnets[1](frames.reshape(b, t, c, h, w).transpose(1, 2))


class Resampler(nn.Module):
    """A convolution under the key `conv`, that shrinks or grows an axis."""

    def __init__(self, c_in: int, c_out: int, *, time: int = 1, space: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv(c_in, c_out, time=time, space=space)


class CausalDown(nn.Module):
    """A level of the encoder: res blocks, then half the places, then half the frames."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            CausalResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)
        )
        if space:
            self.downsamplers = nn.ModuleList([Resampler(c_out, c_out, space=2)])
        if time:
            self.temporal_downsamplers = nn.ModuleList([Resampler(c_out, c_out, time=2)])
        self.space, self.time = space, time

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output."""
        for block in self.resnets:
            x = block(x)
        if self.space:
            x = self.downsamplers[0].conv(x)
        return self.temporal_downsamplers[0].conv(x) if self.time else x


class CausalUp(nn.Module):
    """A level of the decoder: res blocks, then twice the places, then twice the frames."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            CausalResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)
        )
        if space:
            self.upsamplers = nn.ModuleList([Resampler(c_out, 4 * c_out)])
        if time:
            self.temporal_upsamplers = nn.ModuleList([Resampler(c_out, 2 * c_out)])
        self.space, self.time = space, time

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's output; the first frame of a clip stays one."""
        for block in self.resnets:
            x = block(x)
        if self.space:
            x = _to_places(self.upsamplers[0].conv(x))
        if self.time:
            conv = self.temporal_upsamplers[0].conv
            begins = conv.is_first
            x = _to_frames(conv(x))
            x = x[:, :, 1:] if begins else x
        return x


def _to_places(x: Tensor) -> Tensor:
    """Return [B, C, T, 2H, 2W] from [B, 4C, T, H, W]: channel 4c + 2r + s becomes place (2h + r, 2w + s)."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // 4, 2, 2, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return x.reshape(b, c // 4, t, 2 * h, 2 * w)


def _to_frames(x: Tensor) -> Tensor:
    """Return [B, C, 2T, H, W] from [B, 2C, T, H, W]: channel 2c + s becomes frame 2t + s."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c // 2, 2, t, h, w).transpose(2, 3).reshape(b, c // 2, 2 * t, h, w)


class CausalEncoder(nn.Module):
    """Frames -> moments."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, g = config.encoder_block_out_channels, config.encoder_norm_num_groups
        self.conv_in = CausalConv(config.encoder_in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            CausalDown(
                widths[max(i - 1, 0)],
                width,
                config.encoder_layers_per_block[i],
                g,
                space=config.encoder_spatial_down_sample[i],
                time=config.encoder_temporal_down_sample[i],
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = CausalMid(widths[-1], g)
        self.conv_norm_out = FrameNorm(g, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], 2 * config.encoder_out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 2 c, T, H, W] of frames [B, 3, 8 (T - 1) + 1, 8 H, 8 W]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(self.mid_block(x))))


class CausalDecoder(nn.Module):
    """Latents -> frames."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, g = config.decoder_block_out_channels[::-1], config.decoder_norm_num_groups
        self.conv_in = CausalConv(config.decoder_in_channels, widths[0])
        self.mid_block = CausalMid(widths[0], g)
        self.up_blocks = nn.ModuleList(
            CausalUp(
                widths[max(i - 1, 0)],
                width,
                config.decoder_layers_per_block[i],
                g,
                space=config.decoder_spatial_up_sample[i],
                time=config.decoder_temporal_up_sample[i],
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = FrameNorm(g, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], config.decoder_out_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Return frames of latents z [B, c, T, H, W]; a clip's first latent makes one frame, others eight."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


class PyramidDecoder(nn.Module):
    """The half of the VAE that decodes; a forward decodes one chunk."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = CausalConv(config.decoder_in_channels, config.decoder_in_channels, 1)
        self.decoder = CausalDecoder(config)

    def forward(self, z: Tensor) -> Tensor:
        """Return the frames of one chunk of latents [B, c, T, H, W]."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.conv.weight.dtype)))

    def decode_chunks(self, z: Tensor, window: int) -> Iterator[Tensor]:
        """Yield the clip in chunks of the first `window` + 1 latents, then `window` at a time.

        What a chunk's size changes is memory: the clip is the same but for rounding.
        """
        with remembering(self):
            for start, stop in chunk_bounds(z.shape[2], window):
                yield self(z[:, :, start:stop])

    def decode_tiles(self, z: Tensor, window: int, tile: int) -> Tensor:
        """Return the clip decoded in tiles of `tile` pixels that fade over a quarter; each tile in chunks.

        Norms see a tile alone: the clip is another than the whole one's.
        """
        size = tile // self.config.space_factor
        along = Along(size, size * 3 // 4, tile // 4, tile - tile // 4)

        def decode(some: Tensor) -> Tensor:
            return torch.cat(list(self.decode_chunks(some, window)), 2)

        return in_space(z, Tiling(None, along, along), decode)


class PyramidEncoder(nn.Module):
    """The half of the VAE that encodes; a forward encodes one chunk."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CausalEncoder(config)
        self.quant_conv = CausalConv(2 * config.encoder_out_channels, 2 * config.encoder_out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the moments [B, 2 c, T, H, W] of frames in -1..1: mean, then log-variance."""
        return self.quant_conv(self.encoder(x.to(self.quant_conv.conv.weight.dtype)))

    def encode_chunks(self, x: Tensor, window: int) -> Iterator[Tensor]:
        """Yield moments in chunks: those of the first `window` + 1 frames, then of `window` at a time.

        `window` is a multiple of the frames of a latent, and the clip one frame longer than one.
        """
        with remembering(self):
            for start, stop in chunk_bounds(x.shape[2], window):
                yield self(x[:, :, start:stop])

    def encode_tiles(self, x: Tensor, window: int, tile: int) -> Tensor:
        """Return moments encoded in tiles of `tile` pixels that fade over a quarter; each tile in chunks."""
        size = tile // self.config.space_factor
        along = Along(tile, tile * 3 // 4, size // 4, size - size // 4)

        def encode(some: Tensor) -> Tensor:
            return torch.cat(list(self.encode_chunks(some, window)), 2)

        return in_space(x, Tiling(None, along, along), encode)


class CausalVideoVAE(nn.Module):
    """The whole VAE under its official keys: what a checkpoint is held to."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        encoder, decoder = PyramidEncoder(config), PyramidDecoder(config)
        self.encoder, self.quant_conv = encoder.encoder, encoder.quant_conv
        self.decoder, self.post_quant_conv = decoder.decoder, decoder.post_quant_conv


@contextmanager
def remembering(module: nn.Module) -> Iterator[None]:
    """Let every convolution keep the end of what it is given, for the length of one clip."""
    convs = [m for m in module.modules() if isinstance(m, CausalConv)]
    try:
        for conv in convs:
            conv.remember = True
        yield
    finally:
        for conv in convs:
            conv.remember, conv.kept = False, None


def chunk_bounds(frames: int, window: int) -> list[tuple[int, int]]:
    """Return where the chunks of a clip begin and end: `window` + 1 first, then `window` each."""
    if window < 1:
        raise ConfigError(f"window = {window}: at least 1 is needed")
    starts = [0, *range(window + 1, frames, window)]
    return [(a, min(b, frames)) for a, b in zip(starts, [*starts[1:], frames], strict=True)]
