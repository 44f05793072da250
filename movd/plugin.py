"""What movd offers to blockstream: the pipeline and its model families. Found by entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockstream.hookspecs import Choice, ModelFamily, hookimpl


def _pipeline(options: Any) -> Any:
    from movd.pipeline import MovdPipeline

    return MovdPipeline(options)


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the text-to-video pipeline."""
    from movd.options import MovdOptions

    return [Choice("movd", _pipeline, MovdOptions, summary="text to video with Open-Sora v1.2")]


def _stdit3() -> Any:
    import torch

    from movd.stdit3 import STDIT3_XL_2, STDiT3

    with torch.device("meta"):
        return STDiT3(STDIT3_XL_2)


def _vae() -> Any:
    import torch

    from movd.vae import OPENSORA_VAE_V1_2, OpenSoraVAE

    with torch.device("meta"):
        return OpenSoraVAE(OPENSORA_VAE_V1_2)


@hookimpl
def model_families() -> Sequence[ModelFamily]:
    """List Open-Sora v1.2's own networks in their full size."""
    return [
        ModelFamily("stdit3-xl-2", _stdit3, summary="STDiT3-XL/2, 1.1 B parameters"),
        ModelFamily("opensora-vae", _vae, summary="OpenSora VAE v1.2, 0.39 B parameters"),
    ]
