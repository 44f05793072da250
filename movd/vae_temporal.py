"""The causal temporal VAE of Open-Sora v1.2: 4x in time, on the latents of the 2-D VAE.

Key names are those of hpcai-tech/OpenSora-VAE-v1.2 under `temporal_vae.`. All tensors are [B, C, T, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from movd.official import OfficialConfig


class TemporalVAEConfig(OfficialConfig):
    """The temporal VAE's official names; the defaults are the released model's."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    @property
    def time_factor(self) -> int:
        """Return how many frames one latent frame stands for."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level."""
        return tuple(self.filters * m for m in self.channel_multipliers)


class CausalConv3d(nn.Module):
    """A 3-D convolution that sees no later frame: zeros in front in time, around in space."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.time_pad = (kernel - 1) + (1 - time_stride)
        self.conv = nn.Conv3d(
            c_in,
            c_out,
            kernel,
            stride=(time_stride, 1, 1),
            padding=(0, kernel // 2, kernel // 2),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x [B, C, T, H, W]."""
        if self.time_pad:
            x = nn.functional.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        return self.conv(x)


class ChunkNorm(nn.GroupNorm):
    """Group norm whose statistics run over the whole (T, H, W) of a chunk."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised; computed on a rank-4 view, which every backend can express."""
        return super().forward(x.flatten(3)).view_as(x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = ChunkNorm(groups, c_in, eps=1e-5)
        self.conv1 = CausalConv3d(c_in, c_out, 3, bias=False)
        self.norm2 = ChunkNorm(groups, c_out, eps=1e-5)
        self.conv2 = CausalConv3d(c_out, c_out, 3, bias=False)
        if c_in != c_out:
            self.conv3 = CausalConv3d(c_in, c_out, 1, bias=False)
        self.widens = c_in != c_out

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [B, c_out, T, H, W]."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return h + (self.conv3(x) if self.widens else x)


def _stack(n: int, c_in: int, c_out: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(n))


class Encoder(nn.Module):
    """Frames' latents -> moments of the temporal latent."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        n, g, widths = config.num_res_blocks, config.num_groups, config.widths
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        c = config.filters
        for i, width in enumerate(widths):
            self.block_res_blocks.append(_stack(n, c, width, g))
            c = width
            if i < len(widths) - 1:
                halves = config.temporal_downsample[i]
                self.conv_blocks.append(CausalConv3d(c, c, 3, time_stride=2) if halves else nn.Identity())
        self.res_blocks = _stack(n, c, c, g)
        self.norm1 = ChunkNorm(g, c, eps=1e-5)
        self.conv2 = CausalConv3d(c, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return moments [B, 2 latent, T / time_factor, H, W]."""
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            for block in level:
                x = block(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(nn.functional.silu(self.norm1(x)))


class Decoder(nn.Module):
    """Temporal latent -> frames' latents."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        n, g, widths = config.num_res_blocks, config.num_groups, config.widths
        c = widths[-1]
        self.conv1 = CausalConv3d(config.embed_dim, c, 3)
        self.res_blocks = _stack(n, c, c, g)
        stacks, convs = [], []
        for i in reversed(range(len(widths))):
            stacks.append(_stack(n, c, widths[i], g))
            c = widths[i]
            if i > 0:
                doubles = config.temporal_downsample[i - 1]
                convs.append(CausalConv3d(c, 2 * c, 3) if doubles else nn.Identity())
        self.block_res_blocks = nn.ModuleList(reversed(stacks))
        self.conv_blocks = nn.ModuleList(reversed(convs))
        self.norm1 = ChunkNorm(g, c, eps=1e-5)
        self.conv_out = CausalConv3d(c, config.in_out_channels, 3)

    def block_order(self) -> tuple[str, ...]:
        """Return the names of the blocks worth streaming, in the order one forward runs them."""
        names = [f"res_blocks.{j}" for j in range(len(self.res_blocks))]
        for i in reversed(range(len(self.block_res_blocks))):
            names += [f"block_res_blocks.{i}.{j}" for j in range(len(self.block_res_blocks[i]))]
            if i > 0 and not isinstance(self.conv_blocks[i - 1], nn.Identity):
                names.append(f"conv_blocks.{i - 1}")
        return tuple(names)

    def forward(self, z: Tensor) -> Tensor:
        """Return frames' latents [B, C, T * time_factor, H, W]."""
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for i in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[i]:
                x = block(x)
            if i > 0 and not isinstance(self.conv_blocks[i - 1], nn.Identity):
                x = channels_to_time(self.conv_blocks[i - 1](x))
        return self.conv_out(nn.functional.silu(self.norm1(x)))


def channels_to_time(x: Tensor) -> Tensor:
    """Return [B, C, 2T, H, W] from [B, 2C, T, H, W]: channel 2c + s becomes frame 2t + s.

    One slice a frame parity, so that no view exceeds rank 5.
    """
    b, c, t, h, w = x.shape
    parts = [x[:, s::2].reshape(b, c // 2, t, 1, h * w) for s in range(2)]
    return torch.cat(parts, dim=3).reshape(b, c // 2, 2 * t, h, w)


class TemporalVAE(nn.Module):
    """The temporal half: chunks of frames' latents to latents a quarter as many, and back."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.embed_dim, 1)
        self.decoder = Decoder(config)

    def front(self, num_frames: int) -> int:
        """Return the frames put in front so that the number divides by the time factor."""
        return -num_frames % self.config.time_factor

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, both [B, latent, ceil(T / time_factor), H, W].

        Zero *latent* frames are put in front of a chunk that does not divide, as in the original.
        """
        x = x.to(self.quant_conv.conv.weight.dtype)
        x = nn.functional.pad(x, (0, 0, 0, 0, self.front(x.shape[2]), 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Return the latents of `num_frames` frames; what encoding put in front is dropped."""
        x = self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.conv.weight.dtype)))
        return x[:, :, self.front(num_frames) :]
