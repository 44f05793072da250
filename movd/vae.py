"""OpenSoraVAE v1.2: an image autoencoder on frames, then a causal VAE over time.

Key names are those of hpcai-tech/OpenSora-VAE-v1.2. Time goes in micro chunks of 17 frames = 5 latent frames;
group norms see a whole chunk, so the chunk length is part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.official import BOOKKEEPING, OfficialConfig
from movd.vae_frames import FrameVAE, FrameVAEConfig
from movd.vae_temporal import TemporalVAE, TemporalVAEConfig

#: Hard-coded in the original, whatever `scaling_factor` the 2-D VAE's own configuration names.
LATENT_SCALE = 0.18215

#: The 2-D VAE of PixArt-Sigma (the SDXL VAE).
SDXL_VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.13025,
}


class OpenSoraVAEConfig(OfficialConfig):
    """The VAE's official names; the defaults are the released model's.

    The config.json of the release (`vae_2d`, `vae_temporal`) is accepted as it is. `micro_batch_size` is the
    most frames one call of the 2-D VAE takes, `micro_pixels` the most pixels of all its frames together (one
    frame at the least): both bound memory and, as every batch size, are part of the numerics.
    """

    ignored: ClassVar = frozenset(
        {"cal_loss", "freeze_vae_2d", "local_files_only", "cache_dir", "vae_2d", "vae_temporal"}
    )

    spatial: Mapping[str, Any] = Field(default_factory=lambda: dict(SDXL_VAE))
    temporal: TemporalVAEConfig = TemporalVAEConfig()
    micro_frame_size: int = Field(default=17, ge=1)
    micro_z_frame_size: int = 5
    micro_batch_size: int = Field(default=4, ge=1)
    micro_pixels: int = Field(default=256 * 256, ge=1)
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    @model_validator(mode="before")
    @classmethod
    def _release_layout(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kinds = {"vae_2d": "VideoAutoencoderKL", "vae_temporal": "VAE_Temporal_SD"}
        for key, kind in kinds.items():
            named = (values.get(key) or {}).get("type", kind)
            if named != kind:
                raise ConfigError(f"{cls.__name__}: {key}.type = {named!r}, supported: {kind!r}")
        values = dict(values)
        batch = (values.get("vae_2d") or {}).get("micro_batch_size")
        if batch is not None:
            values.setdefault("micro_batch_size", batch)
        frames = values.get("micro_frame_size", 17)
        temporal = values.get("temporal", {})
        if not isinstance(temporal, TemporalVAEConfig):
            temporal = TemporalVAEConfig(**temporal)
        latent = -(-frames // temporal.time_factor)
        if values.setdefault("micro_z_frame_size", latent) != latent:
            raise ConfigError(
                f"{cls.__name__}: micro_z_frame_size = {values['micro_z_frame_size']}, but "
                f"{frames} frames of a chunk make {latent} latent frames"
            )
        return values

    @field_validator("spatial")
    @classmethod
    def _spatial_keys(cls, spatial: Mapping[str, Any]) -> Mapping[str, Any]:
        kept = {key: value for key, value in spatial.items() if key not in BOOKKEEPING}
        try:
            FrameVAEConfig.of(kept)
        except ConfigError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error
        return kept

    @property
    def space_factor(self) -> int:
        """Return how many pixels, each way, one latent stands for."""
        return 2 ** (len(self.spatial["block_out_channels"]) - 1)

    def latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of a clip: 5 a full chunk of 17, ceil(r / 4) of the rest."""
        return sum(-(-frames // self.temporal.time_factor) for frames in self.chunks(num_frames))

    def chunks(self, num_frames: int) -> list[int]:
        """Return the frames of each micro chunk of a clip."""
        full, rest = divmod(num_frames, self.micro_frame_size)
        return [self.micro_frame_size] * full + [rest] * (rest > 0)

    def frames_a_call(self, height: int, width: int) -> int:
        """Return the frames one call of the 2-D VAE takes at a size in pixels."""
        return max(1, min(self.micro_batch_size, self.micro_pixels // (height * width)))


class SpatialVAE(nn.Module):
    """The VAE of frames under the key prefix `module.`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = FrameVAE(config)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [N, 4, H/8, W/8] of frames [N, 3, H, W] in -1..1."""
        x = x.to(self.module.quant_conv.weight.dtype)
        mean, logvar = self.module.quant_conv(self.module.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Return frames [N, 3, H, W] of unscaled latents [N, 4, H/8, W/8]."""
        conv = self.module.post_quant_conv
        return self.module.decoder(conv(z.to(conv.weight.dtype)))


class OpenSoraVAE(nn.Module):
    """The whole VAE: clips [B, 3, T, H, W] in -1..1 to normalised latents [B, 4, T', H/8, W/8], and back.

    Each half computes in the dtype of its weights; latents are float32.

    What decoding holds beside weights and finished frames does not grow with the clip: at 256x256 in
    float32 about 0.23 GB for a temporal chunk, then 0.46 GB for a call on one frame; both go with the pixels.
    """

    def __init__(self, config: OpenSoraVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or OpenSoraVAEConfig()
        self.spatial_vae = SpatialVAE(self.config.spatial)
        self.temporal_vae = TemporalVAE(self.config.temporal)
        self._planned = (self.config.micro_frame_size, 256, 256, 1)
        for name in ("scale", "shift"):
            row = torch.tensor(getattr(self.config, name)).view(1, -1, 1, 1, 1)
            self.register_buffer(name, row)

    def encode(
        self,
        x: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the latents of a clip [B, 3, T, H, W] in -1..1.

        Both posteriors are drawn from, as in the original, or taken at their mean (`sample=False`).
        `noise` gives the draws: [B*T, 4, h, w] in (B T) order and [B, 4, T', h, w].
        """
        x_z = self.encode_frames(x, sample=sample, generator=generator, noise=noise[0] if noise else None)
        draws = _Draws(sample, generator, noise[1] if noise else None, dim=2)
        parts = [
            draws(*self.temporal_vae.moments(chunk))
            for chunk in x_z.split(self.config.micro_frame_size, dim=2)
        ]
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def encode_frames(
        self,
        x: Tensor,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the latents [B, 4, T, H/8, W/8] between the two VAEs, times 0.18215."""
        b, _, _, height, width = x.shape
        draws = _Draws(sample, generator, noise, dim=0)
        rows = x.transpose(1, 2).flatten(0, 1).split(self.config.frames_a_call(height, width))
        z = torch.cat([draws(*self.spatial_vae.moments(frames)) for frames in rows])
        return (z * LATENT_SCALE).unflatten(0, (b, -1)).transpose(1, 2)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Return the clip [B, 3, num_frames, H, W] of latents; not clamped to -1..1."""
        return torch.cat(list(self.decode_chunks(z, num_frames)), dim=2)

    def decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Yield the clip 17 frames at a time, so that a long one is never whole in memory.

        Raises ValueError if `num_frames` does not make the latent frames of z.
        """
        if z.shape[2] != self.config.latent_frames(num_frames):
            raise ValueError(
                f"{z.shape[2]} latent frames are not {num_frames} frames, "
                f"which have {self.config.latent_frames(num_frames)}"
            )
        latents = z.split(self.config.micro_z_frame_size, dim=2)
        for chunk, frames in zip(latents, self.config.chunks(num_frames), strict=True):
            yield self(chunk, frames)

    def plan_decode(self, frames: int, height: int, width: int, batch: int = 1) -> None:
        """Fix what one pass decodes, in frames and pixels, so that `stream_order` is exact."""
        self._planned = (frames, height, width, batch)

    def stream_order(self) -> tuple[str, ...]:
        """Return the blocks one `forward` runs, in order: the temporal ones, then the 2-D ones per call.

        What is in no block (the first and last convolutions and norms) is small. Without `plan_decode`
        this is the order of a full chunk at 256x256.
        """
        frames, height, width, batch = self._planned
        temporal = [f"temporal_vae.decoder.{name}" for name in self.temporal_vae.decoder.block_order()]
        net = "spatial_vae.module.decoder"
        ups = len(self.spatial_vae.module.decoder.up_blocks)
        spatial = [f"{net}.mid_block", *(f"{net}.up_blocks.{i}" for i in range(ups))]
        calls = -(-batch * frames // self.config.frames_a_call(height, width))
        return tuple(temporal + spatial * calls)

    def forward(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode one chunk, at most 5 latent frames: one pass of the network."""
        return self.decode_frames(self.temporal_vae.decode(z * self.scale + self.shift, num_frames))

    def decode_frames(self, x_z: Tensor) -> Tensor:
        """Return the frames [B, 3, T, H, W] of the latents between the two VAEs."""
        b, _, _, h, w = x_z.shape
        factor = self.config.space_factor
        rows = (x_z / LATENT_SCALE).transpose(1, 2).flatten(0, 1)
        calls = rows.split(self.config.frames_a_call(h * factor, w * factor))
        x = torch.cat([self.spatial_vae.decode(frames) for frames in calls])
        return x.unflatten(0, (b, -1)).transpose(1, 2)


class _Draws:
    """Draws from one posterior after another, walking through noise that was given whole."""

    def __init__(
        self, sample: bool, generator: torch.Generator | None, noise: Tensor | None, dim: int
    ) -> None:
        self.sample, self.generator, self.noise, self.dim = sample, generator, noise, dim
        self.start = 0

    def __call__(self, mean: Tensor, logvar: Tensor) -> Tensor:
        if not self.sample:
            return mean
        n = mean.shape[self.dim]
        if self.noise is not None:
            noise = self.noise.narrow(self.dim, self.start, n)
        else:
            # On the processor wherever compute is: a seed means the same.
            noise = torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype).to(mean.device)
        self.start += n
        return mean + torch.exp(0.5 * logvar) * noise


#: hpcai-tech/OpenSora-VAE-v1.2: 393.3 M parameters.
OPENSORA_VAE_V1_2 = OpenSoraVAEConfig()
