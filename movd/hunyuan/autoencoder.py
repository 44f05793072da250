"""HunyuanVideo's VAE decoder, and the tiles a clip is decoded in.

A norm's statistics and the attention run over a whole call, so tiles are part of the result: the same clip in
other tiles is another clip. One call of the decoder is one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import ConfigError
from movd.hunyuan.hunyuan_released import HUNYUAN_VAE
from movd.official import BOOKKEEPING
from movd.renamed import prefix_before, renamed
from movd.tiled import Along, Tiling, in_time

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


#: Tencent's own name of the class; the network and its keys are the same.
_TENCENTS = "AutoencoderKLCausal3D"
_SHARED = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")


def vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json, Tencent's included, as diffusers' class has it, every key named."""
    if config.get("_class_name") != _TENCENTS:
        return {**HUNYUAN_VAE, **config}
    kept = {name: config[name] for name in (*_SHARED, "norm_num_groups", "scaling_factor") if name in config}
    return {**HUNYUAN_VAE, **kept}


def vae_entries(checkpoint: Checkpoint) -> Checkpoint:
    """Return the VAE's tensors under diffusers' names: Tencent's file has the same, perhaps after `vae.`."""
    prefix = prefix_before(checkpoint, "decoder.conv_in.conv.weight", ("", "vae."))
    return renamed(checkpoint, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


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


def tiling(time: str, space: int | None, time_factor: int, space_factor: int) -> Tiling:
    """Return the tiles that options name.

    `time`: diffusers, tencent or whole. `space`: pixels a side of tiles fading over a quarter; None: whole.
    """
    frames = {"diffusers": (16, 12), "tencent": (64, 48), "whole": None}[time]
    along_time = along_space = None
    if frames is not None:
        size, stride = frames
        along_time = Along(size // time_factor, stride // time_factor, size - stride, stride)
    if space is not None:
        size, blend = space // space_factor, space // 4
        along_space = Along(size, size * 3 // 4, blend, space - blend)
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
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))

    def decode_clips(self, z: Tensor, tiles: Tiling) -> Iterator[Tensor]:
        """Yield the samples of latents [B, c, T, H, W], as a model makes them, a tile in time at a time."""
        kind = self.post_quant_conv.weight.dtype
        z = z.to(kind) / self.scaling_factor
        yield from in_time(z, tiles, self, self.time_factor * (z.shape[2] - 1) + 1)
