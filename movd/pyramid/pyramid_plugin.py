"""What Pyramidal Flow offers to blockstream: the pipeline and its networks. Found by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockstream.plugins import Choice, ModelFamily, hookimpl
from movd.pyramid.pyramid_released import CAUSAL_VAE, MINIFLUX


def _pipeline(options: Any) -> Any:
    from movd.pyramid.pyramid_flow import PyramidFlow
    from movd.text_to_video.pipeline import TextToVideo

    return TextToVideo(PyramidFlow(options))


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the text-to-video pipeline."""
    from movd.pyramid.pyramid_options import PyramidOptions

    return [Choice("pyramid-flow", _pipeline, PyramidOptions, summary="text to video with Pyramidal Flow")]


def _dit(config: Mapping[str, Any] = MINIFLUX) -> Any:
    import torch

    from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig

    with torch.device("meta"):
        return MiniFlux(MiniFluxConfig(**config)).eval()


def _vae(config: Mapping[str, Any] = CAUSAL_VAE) -> Any:
    import torch

    from movd.pyramid.causal_vae import CausalVAEConfig, CausalVideoVAE

    with torch.device("meta"):
        return CausalVideoVAE(CausalVAEConfig(**config)).eval()


def _is_dit(config: Mapping[str, Any]) -> Any:
    return _dit(config) if config.get("_class_name") == "PyramidFluxTransformer" else None


def _is_vae(config: Mapping[str, Any]) -> Any:
    return _vae(config) if config.get("_class_name") == "CausalVideoVAE" else None


@hookimpl
def model_families() -> Sequence[ModelFamily]:
    """List Pyramidal Flow's networks in their full size."""
    return [
        ModelFamily(
            "pyramid-miniflux",
            _dit,
            summary="Pyramidal Flow's miniFLUX, 1.97 B parameters",
            config=MINIFLUX,
            from_config=_is_dit,
        ),
        ModelFamily(
            "pyramid-vae",
            _vae,
            summary="Pyramidal Flow's causal VAE, 0.34 B parameters",
            config=CAUSAL_VAE,
            from_config=_is_vae,
        ),
    ]
