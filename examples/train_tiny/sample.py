"""Sample many captions at once with the plain modules, all in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from examples.train_tiny import data, text, train_temporal
from movd.rflow import OpenSoraFlow
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import T5Encoder, embed, t5_encoder
from movd.tokenizer import Tokenizer, load_tokenizer
from movd.vae import OpenSoraVAE


@dataclass(frozen=True)
class Tiny:
    """Hold the models of one folder: t5/, dit/, vae/."""

    tokenizer: Tokenizer
    encoder: T5Encoder
    dit: STDiT3
    vae: OpenSoraVAE


def load(folder: Path) -> Tiny:
    """Return the models saved in a folder, in evaluation mode."""
    encoder = t5_encoder(json.loads((folder / "t5/config.json").read_text()))
    shared = load_file(folder / "t5/model.safetensors")
    encoder.load_state_dict({**shared, "encoder.embed_tokens.weight": shared["shared.weight"]})
    dit = STDiT3(STDiT3Config(**json.loads((folder / "dit/config.json").read_text())))
    dit.load_state_dict(load_file(folder / "dit/model.safetensors"))
    return Tiny(
        tokenizer=load_tokenizer(folder / "t5", text.MAX_TOKENS),
        encoder=encoder,
        dit=dit.eval(),
        vae=train_temporal.load(folder / "vae"),
    )


def conditions() -> dict[str, torch.Tensor]:
    """Return what the DiT is told of rate and size."""
    size = torch.tensor([float(data.SIZE)])
    return {"fps": torch.tensor([float(data.FPS)]), "height": size, "width": size}


@torch.no_grad()
def sample(
    tiny: Tiny, captions: list[str], seeds: list[int], steps: int = 30, guidance: float = 3.0
) -> torch.Tensor:
    """Return latents [n, 4, T', h, w], one seed a caption: Euler steps on Open-Sora's schedule."""
    y, mask = embed(tiny.encoder, tiny.tokenizer, captions)
    shape = (4, tiny.vae.config.latent_frames(data.FRAMES), data.SIZE // 8, data.SIZE // 8)
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    flow = OpenSoraFlow(tiny.dit, y, mask, steps, guidance, data.SIZE, data.SIZE, data.FRAMES, data.FPS)
    for i in range(steps):
        z = flow.advance(z, flow.velocity(z, i), i, i + 1)
    return z


@torch.no_grad()
def decode(tiny: Tiny, latents: torch.Tensor) -> list[np.ndarray]:
    """Return one uint8 clip [FRAMES, SIZE, SIZE, 3] for each row of latents."""
    videos = tiny.vae.decode(latents, data.FRAMES)
    return [train_temporal.to_frames(video) for video in videos]
