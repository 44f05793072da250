"""Any pipeline of diffusers from a YAML file: its networks are streamed as stages of one schedule.

    pipeline: diffusers
    folder: stabilityai/stable-diffusion-xl-base-1.0   # a folder, or a hub's id in the local cache
    prompt: a lighthouse at dusk
    call: {num_inference_steps: 30, guidance_scale: 5.0, height: 768, width: 768}
    budget: 3.3GiB

What `call` may hold is what the pipeline's own `__call__` takes. In: options; out: pictures, videos, sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockstream.plugins import Choice, hookimpl

from .options import Options

if TYPE_CHECKING:
    from .making import Diffusers

__all__ = ["Options"]


def _making(options: Options) -> Diffusers:
    from .making import Diffusers

    return Diffusers(options)


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the pipeline of this plugin."""
    return [Choice("diffusers", _making, Options, "any pipeline of diffusers, from its folder")]
