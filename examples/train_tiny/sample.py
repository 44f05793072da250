"""Sample many captions at once with the plain modules, all in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import T5Config, T5EncoderModel

from examples.train_tiny import data, text, train_temporal
from movd.stdit3 import STDiT3, STDiT3Config
from movd.vae import OpenSoraVAE


@dataclass(frozen=True)
class Tiny:
    """Hold the models of one folder: t5/, dit/, vae/."""

    tokenizer: Tokenizer
    encoder: T5EncoderModel
    dit: STDiT3
    vae: OpenSoraVAE


def load(folder: Path) -> Tiny:
    """Return the models saved in a folder, in evaluation mode."""
    encoder = T5EncoderModel(T5Config(**json.loads((folder / "t5/config.json").read_text())))
    encoder.load_state_dict(load_file(folder / "t5/model.safetensors"), strict=False)
    dit = STDiT3(STDiT3Config(**json.loads((folder / "dit/config.json").read_text())))
    dit.load_state_dict(load_file(folder / "dit/model.safetensors"))
    return Tiny(
        tokenizer=Tokenizer.from_file(str(folder / "t5/tokenizer.json")),
        encoder=encoder.eval(),
        dit=dit.eval(),
        vae=train_temporal.load(folder / "vae"),
    )


def times(steps: int) -> list[float]:
    """Return Open-Sora's schedule for these videos, 1 down to 0, steps + 1 numbers."""
    frames = data.FRAMES // 17 * 5
    ratio = (data.SIZE * data.SIZE / 512**2) ** 0.5 * frames**0.5
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [ratio * u / (1 + (ratio - 1) * u) for u in uniform]


def conditions() -> dict[str, torch.Tensor]:
    """Return what the DiT is told of rate and size."""
    size = torch.tensor([float(data.SIZE)])
    return {"fps": torch.tensor([float(data.FPS)]), "height": size, "width": size}


@torch.no_grad()
def sample(
    tiny: Tiny, captions: list[str], seeds: list[int], steps: int = 30, guidance: float = 3.0
) -> torch.Tensor:
    """Return latents [n, 4, T', h, w], one seed a caption: Euler steps with guidance."""
    ids, mask = text.encode(tiny.tokenizer, captions)
    y = tiny.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, None]
    null = tiny.dit.y_embedder.y_embedding.expand(len(y), 1, -1, -1)
    y, mask = torch.cat([y, null]), torch.cat([mask, mask])
    shape = (4, tiny.vae.config.latent_frames(data.FRAMES), data.SIZE // 8, data.SIZE // 8)
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    at = times(steps)
    for now, after in pairwise(at):
        t = torch.full((2 * len(z),), 1000 * now)
        out = tiny.dit(torch.cat([z, z]), t, y, mask=mask, **conditions())
        guided, plain = out[:, :4].chunk(2)
        z = z + (plain + guidance * (guided - plain)) * (now - after)
    return z


@torch.no_grad()
def decode(tiny: Tiny, latents: torch.Tensor) -> list[np.ndarray]:
    """Return one uint8 clip [FRAMES, SIZE, SIZE, 3] for each row of latents."""
    videos = tiny.vae.decode(latents, data.FRAMES)
    return [train_temporal.to_frames(video) for video in videos]
