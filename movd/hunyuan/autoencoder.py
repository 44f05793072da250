"""HunyuanVideo's VAE decoder, and the tiles a clip is decoded in.

A norm's statistics and the attention run over a whole call, so tiles are part of the result: the same clip in
other tiles is another clip. One call of the decoder is one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.official import BOOKKEEPING
from movd.tiled import Along, Tiling, in_time

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

#: hunyuanvideo-community/HunyuanVideo vae/: 246 M parameters; the class's own defaults.
HUNYUAN_VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}


def hunyuan_vae(config: Mapping[str, Any]) -> AutoencoderKLHunyuanVideo:
    """Build the whole VAE of a config.json, in eval mode. Raises ConfigError for another model."""
    from diffusers import AutoencoderKLHunyuanVideo

    kind = config.get("_class_name", "AutoencoderKLHunyuanVideo")
    if kind != "AutoencoderKLHunyuanVideo":
        raise ConfigError(f"_class_name {kind!r} is not 'AutoencoderKLHunyuanVideo'")
    own = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    foreign = sorted(own.keys() - inspect.signature(AutoencoderKLHunyuanVideo.__init__).parameters.keys())
    if foreign:
        raise ConfigError(f"AutoencoderKLHunyuanVideo has no {foreign}")
    return AutoencoderKLHunyuanVideo(**own).eval()


def tiling(time: str, space: bool, time_factor: int, space_factor: int) -> Tiling:
    """Return the tiles that options name.

    `time`: diffusers, tencent or whole. `space`: tiles of 256 pixels, or none.
    """
    frames = {"diffusers": (16, 12), "tencent": (64, 48), "whole": None}[time]
    along_time = along_space = None
    if frames is not None:
        size, stride = frames
        along_time = Along(size // time_factor, stride // time_factor, size - stride, stride)
    if space:
        along_space = Along(256 // space_factor, 192 // space_factor, 64, 192)
    return Tiling(along_time, along_space, along_space)


class HunyuanDecoder(nn.Module):
    """The half of the VAE that decodes; a forward decodes one tile."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        whole = hunyuan_vae(config)
        self.post_quant_conv, self.decoder = whole.post_quant_conv, whole.decoder
        self.scaling_factor = whole.config.scaling_factor
        self.space_factor = whole.config.spatial_compression_ratio
        self.time_factor = whole.config.temporal_compression_ratio
        self.latent_channels = whole.config.latent_channels

    def forward(self, z: Tensor) -> Tensor:
        """Return samples [B, 3, 4 (T - 1) + 1, 8 H, 8 W] of one tile of unscaled latents [B, c, T, H, W]."""
        return self.decoder(self.post_quant_conv(z))

    def decode_clips(self, z: Tensor, tiles: Tiling) -> Iterator[Tensor]:
        """Yield the samples of latents [B, c, T, H, W], as a model makes them, a tile in time at a time."""
        z = z.to(self.post_quant_conv.weight.dtype) / self.scaling_factor
        yield from in_time(z, tiles, self, self.time_factor * (z.shape[2] - 1) + 1)
