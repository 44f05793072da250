"""Text to video: T5 -> STDiT3 -> VAE, three stages of one schedule.

Prompts go stage by stage: all through T5, each denoised, each decoded. What a stage makes is on disk
before the next begins, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from blockstream.nn.empty import empty
from blockstream.pipeline import Run
from blockstream.segments import AtMost, Exactly
from movd.attention import attention_hooks
from movd.captions import official_prompt
from movd.options import MovdOptions
from movd.rflow import OpenSoraFlow
from movd.state import Progress
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import T5_V1_1_XXL, embed, t5_encoder
from movd.tokenizer import load_tokenizer
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from movd.video import to_frames, write_image, write_video

if TYPE_CHECKING:
    from blockstream.nn.session import Session


class MovdPipeline:
    """One run of Open-Sora v1.2. See `blockstream.pipeline.Pipeline`."""

    def __init__(self, options: MovdOptions) -> None:
        self.options = options
        self.height, self.width = options.size
        self.captions = [official_prompt(text, options.aesthetic) for text in options.texts]

    # -- stages ------------------------------------------------------------------------------

    def declare(self, session: Session, run: Run) -> None:
        """Add T5, STDiT3 and the VAE. Checkpoints are matched to the modules; nothing is read but headers."""
        o, n = self.options, len(self.captions)
        folders = {name: getattr(o, name).folder(name) for name in ("t5", "dit", "vae")}
        dit_config = STDiT3Config(**_config(folders["dit"]))
        vae_config = OpenSoraVAEConfig(**_config(folders["vae"]))
        self.tokenizer = load_tokenizer(folders["t5"], dit_config.model_max_length)
        with empty():
            t5 = t5_encoder(_config(folders["t5"], T5_V1_1_XXL))
            dit = STDiT3(dit_config).eval()
            vae = _without_encoder(OpenSoraVAE(vae_config).eval())
        self._check_widths(t5, dit)
        factor = vae_config.space_factor
        self.latent = (
            dit_config.in_channels,
            vae_config.latent_frames(o.frames),
            self.height // factor,
            self.width // factor,
        )
        chunks = vae_config.chunks(o.frames)
        vae.plan_decode(chunks[0], self.latent[2] * factor, self.latent[3] * factor)
        self.t5 = session.stage("t5", t5, folders["t5"], passes=n, dtype=o.t5.dtype)
        self.dit = session.stage("dit", dit, folders["dit"], passes=AtMost(n * o.steps), dtype=o.dit.dtype)
        self.vae = session.stage(
            "vae", vae, folders["vae"], passes=Exactly(n * len(chunks)), dtype=o.vae.dtype
        )

    def _check_widths(self, t5: nn.Module, dit: STDiT3) -> None:
        width, wanted = t5.config.d_model, dit.config.caption_channels
        if width != wanted:
            raise ConfigError(
                f"t5 gives {width} channels a token and dit takes {wanted}: "
                "these checkpoints do not belong together"
            )

    # -- the run -----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make every video; return their files, relative to `run.out`."""
        progress = Progress(run.out, len(self.captions), run.resumed)
        with run.phase("text"):
            texts = [embed(self.t5, self.tokenizer, [caption]) for caption in self.captions]
        session.end("t5")
        with run.phase("denoise"):
            for n, (y, mask) in enumerate(texts):
                self._denoise(session, run, progress, n, y, mask)
        session.end("dit")
        files = []
        with run.phase("decode"):
            for n in range(len(texts)):
                files.append(self._decode(progress, n))
        return {
            "files": [str(file.relative_to(run.out)) for file in files],
            "prompts": list(self.options.texts),
            "height": self.latent[2] * self.vae.config.space_factor,
            "width": self.latent[3] * self.vae.config.space_factor,
            "frames": self.options.frames,
            "fps": self.options.fps,
        }

    def _denoise(
        self, session: Session, run: Run, progress: Progress, n: int, y: Tensor, mask: Tensor
    ) -> None:
        o = self.options
        z = torch.randn((1, *self.latent), generator=torch.Generator().manual_seed(o.seed))
        flow = OpenSoraFlow(
            self.dit,
            y,
            mask,
            o.steps,
            o.guidance,
            self.height,
            self.width,
            o.frames,
            o.fps,
            on_remaining=lambda passes: self._remaining(session, n, passes),
        )
        T, H, W = self.dit.grid(*self.latent[1:])
        with attention_hooks(
            self.dit,
            T=T,
            S=H * W,
            text_tokens=int(mask.sum(1).max()),
            token_merge=run.token_merge,
            attention_kernel=run.attention_kernel,
        ):
            progress.save_latents(n, run.sampler(flow, z))

    def _remaining(self, session: Session, n: int, passes: int) -> None:
        """Let the VAE's head load as soon as the last pass of the last prompt is known to be the last."""
        if passes == 0 and n == len(self.captions) - 1:
            session.end("dit")

    def _decode(self, progress: Progress, n: int) -> Path:
        o, folder = self.options, progress.folder(n)
        z = progress.latents(n)
        if o.frames == 1:
            write_image(folder / "image.png", next(self._frames(z))[0])
            return folder / "image.png"
        write_video(folder / "video.mp4", self._frames(z), o.fps)
        return folder / "video.mp4"

    def _frames(self, z: Tensor) -> Iterator[np.ndarray]:
        for clip in self.vae.decode_chunks(z, self.options.frames):
            yield to_frames(clip[0])


def _without_encoder(vae: OpenSoraVAE) -> OpenSoraVAE:
    """Return the VAE without what only encodes: making a video loads none of it."""
    del vae.spatial_vae.module.encoder, vae.spatial_vae.module.quant_conv
    del vae.temporal_vae.encoder, vae.temporal_vae.quant_conv
    return vae


def _config(folder: Path, fallback: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    path = folder / "config.json"
    if not path.is_file() and fallback is not None:
        return dict(fallback)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; {folder} is not a checkpoint's folder") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} does not hold a configuration")
    return found
