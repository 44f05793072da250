"""Whole pipelines of diffusers, small and of random weights: resident and streamed, compared bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockstream
from blockstream.errors import BlockstreamError
from tests.support.stable_diffusion import save_stable_diffusion
from tests.support.tiny_pipelines import save_flux, save_wan

from .compare import aligned

_SMALL = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}


def _words(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def _compared(
    save: Callable[[Path], Path], call: Mapping[str, Any], result: str, arena: str = "1MiB"
) -> Callable[[Path], str]:
    """Return what saves a pipeline, runs it in memory and twice streamed, and says how results differ."""

    def compare(folder: Path) -> str:
        import diffusers

        save(folder)
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, value in index.items() if value == [None, None]}
        resident = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
        for part in resident.components.values():
            if isinstance(part, nn.Module):
                aligned(part)
        want = _made(resident, call, result)
        try:
            with blockstream.pipeline(folder, arena=arena) as pipe:
                for _ in range(2):
                    got = _made(pipe, call, result)
                    if not torch.equal(got, want):
                        most = float((got - want).abs().max())
                        return f"differs by {most:.2g} of {float(want.abs().max()):.2g}"
        except BlockstreamError as error:
            return f"refused: {error}"
        return "equal"

    return compare


def _made(pipe: Any, call: Mapping[str, Any], result: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = getattr(pipe(**call, **_SMALL, generator=torch.Generator().manual_seed(1)), result)
    return made if isinstance(made, torch.Tensor) else torch.stack(list(made))


def _stable_diffusion(path: Path) -> Path:
    return save_stable_diffusion(path, reads_prompts=True)


PIPELINES: dict[str, Callable[[Path], str]] = {
    "StableDiffusionPipeline": _compared(_stable_diffusion, {"prompt": "a star"}, "images"),
    "StableDiffusionPipeline, 300 KiB": _compared(
        _stable_diffusion, {"prompt": "a star"}, "images", "300KiB"
    ),
    "FluxPipeline": _compared(
        save_flux,
        dict(zip(("prompt_embeds", "pooled_prompt_embeds"), _words((1, 7, 32), (1, 32)), strict=True)),
        "images",
    ),
    "WanPipeline": _compared(
        save_wan,
        {
            **dict(
                zip(("prompt_embeds", "negative_prompt_embeds"), _words((1, 7, 32), (1, 7, 32)), strict=True)
            ),
            "num_frames": 5,
        },
        "frames",
    ),
}
