"""The networks of one config as stages of segments: what `export` writes and `verify` compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blockstream.errors import ConfigError
from blockstream.plugins import AttentionLayer, Merge
from blockstream.run.activation import activate
from blockstream.run.config import RunConfig
from movd.attention import attention_layers
from movd.options import MovdOptions
from movd.rflow import timesteps
from movd.sizes import check_frames
from movd.weights import Weights
from movd_coreml.bound import Bound
from movd_coreml.manifest import Preset, preset_name
from movd_coreml.segments import Sizes, StageRecipe
from movd_coreml.segments_dit import dit_stage, tables
from movd_coreml.segments_t5 import EMBEDDING, t5_stage
from movd_coreml.segments_vae import spatial_stage, temporal_stage

#: (frames, height, width) in pixels.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class What:
    """What to export: sizes (none: the config's), and whether one set of functions ranges over them."""

    sizes: tuple[Size, ...] = ()
    flexible: bool = False


class Networks:
    """The networks a config names, without their weights. Close it: checkpoints stay mapped until then."""

    def __init__(self, config: RunConfig, what: What) -> None:
        if not isinstance(config.pipeline.options, MovdOptions):
            raise ConfigError(
                f"pipeline {config.pipeline.ref!r} has no Core ML segments; export a config of pipeline movd"
            )
        self.config, self.options = config, config.pipeline.options
        self._weights = Weights(self.options)
        self._hooks = activate(config).hook
        self._bound: dict[str, Bound] = {}
        self.tokens = self._weights.dit_config.model_max_length
        self.sizes = Sizes(self._presets(what), what.flexible)

    def identity(self) -> dict[str, str]:
        """Return what tells the networks' weights from others."""
        parts = (self._weights.t5, self._weights.dit, self._weights.vae)
        return {part.name: part.identity for part in parts}

    def network(self, name: str) -> Bound:
        """Return one network: t5, dit or vae."""
        if name not in self._bound:
            w = self._weights
            build, part = {
                "t5": (w.text_encoder, w.t5),
                "dit": (w.denoiser, w.dit),
                "vae": (w.decoder, w.vae),
            }[name]
            self._bound[name] = Bound(name, build(), part.checkpoint)
        return self._bound[name]

    @cached_property
    def stages(self) -> tuple[StageRecipe, ...]:
        """Return the stages in the order they run. No part of the VAE exceeds a pair of STDiT3's blocks."""
        t5, dit, vae = (self.network(name) for name in ("t5", "dit", "vae"))
        most = dit.nbytes(("spatial_blocks.0", "temporal_blocks.0"))
        self._refuse_kernels()
        merge = self._token_merge if self.config.attention else None
        return (
            t5_stage(t5.module, self.tokens),
            dit_stage(dit.module, self.sizes, self.tokens, merge),
            temporal_stage(vae.module, self.sizes, most),
            spatial_stage(vae.module, self.sizes, most),
        )

    def tables(self) -> dict[str, Tensor]:
        """Return the arrays beside the packages, by name. The token embedding is read whole."""
        dit = self.network("dit").module
        found = {
            "t5.embedding": self.network("t5").parameter(EMBEDDING),
            "dit.null_caption": dit.y_embedder.y_embedding.float(),
        }
        if self.sizes.flexible:
            for preset in self.sizes.presets:
                found |= {f"dit.{name}.{preset.name}": t for name, t in tables(dit, preset).items()}
        return found

    def tokenizer_files(self) -> list[Any]:
        """Return the files of the tokenizer."""
        folder = self._weights.t5.folder
        return [folder / name for name in ("tokenizer.json", "spiece.model") if (folder / name).is_file()]

    def close(self) -> None:
        """Unmap the checkpoints."""
        for network in self._bound.values():
            network.close()
        self._bound.clear()

    def __enter__(self) -> Networks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- sizes -------------------------------------------------------------------------------

    def _presets(self, what: What) -> tuple[Preset, ...]:
        sizes = what.sizes or ((self.options.frames, *self.options.size),)
        presets = tuple(self._preset(size) for size in dict.fromkeys(sizes))
        if not what.flexible:
            return presets
        patch = self._weights.dit_config.patch_size
        for preset in presets:
            if any(n % p for n, p in zip(preset.latent, patch, strict=True)):
                raise ConfigError(
                    f"{preset.name}: flexible sizes take latents of whole patches, "
                    f"{preset.latent} of {patch} are not; export this size by itself"
                )
        # One function has one batch: the largest that suits all sizes.
        fewest = min(preset.frames_a_call for preset in presets)
        return tuple(preset.model_copy(update={"frames_a_call": fewest}) for preset in presets)

    def _preset(self, size: Size) -> Preset:
        frames, height, width = size
        vae = self._weights.vae_config
        check_frames(frames)
        if min(height, width) < vae.space_factor * 2:
            raise ConfigError(
                f"preset {preset_name(*size)}: at least {2 * vae.space_factor} pixels are needed each way"
            )
        h, w = height // vae.space_factor, width // vae.space_factor
        chunks = tuple((n, -(-n // vae.temporal.time_factor)) for n in vae.chunks(frames))
        batch = vae.frames_a_call(h * vae.space_factor, w * vae.space_factor)
        times = timesteps(self.options.steps, height, width, frames)
        return Preset(
            name=preset_name(*size),
            frames=frames,
            height=height,
            width=width,
            latent=(vae.latent_frames(frames), h, w),
            chunks=chunks,
            frames_a_call=min(batch, max(n for n, _ in chunks)),
            timesteps=tuple(times.tolist()),
        )

    # -- attention ---------------------------------------------------------------------------

    def _token_merge(self, layer: AttentionLayer) -> Merge | None:
        merge: Merge | None = self._hooks.token_merge(layer=layer)
        return merge

    def _refuse_kernels(self) -> None:
        dit = self.network("dit").module
        for preset in self.sizes.presets:
            for _, layer in attention_layers(dit, dit.grid(*preset.latent), self.tokens):
                if self._hooks.attention_kernel(layer=layer) is not None:
                    names = ", ".join(chosen.ref for chosen in self.config.attention)
                    raise ConfigError(
                        f"attention {names}: computes {layer.name} by a kernel of its own, which no package "
                        "can hold; export without it: --set attention=[]"
                    )


def parse_size(text: str) -> Size:
    """Return (frames, height, width) of FRAMESxHEIGHTxWIDTH. Raises ConfigError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"preset {text!r}: write FRAMESxHEIGHTxWIDTH, for example 51x256x256")
    frames, height, width = map(int, parts)
    return frames, height, width


def gather_frames(x: Tensor, batch: int) -> Sequence[Tensor]:
    """Return x [F, ...] in calls of exactly `batch` frames; the last is filled up with its last frame."""
    short = -len(x) % batch
    whole = torch.cat((x, x[-1:].expand(short, *x.shape[1:]))) if short else x
    return whole.split(batch)
