"""What movd offers to blockstream: the pipeline and its model families. Found by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockstream.plugins import Choice, ModelFamily, hookimpl
from movd.released import OPENSORA_VAE, STDIT3_XL_2, T5_V1_1_XXL


def _pipeline(options: Any) -> Any:
    from movd.opensora import OpenSora
    from movd.text_to_video.pipeline import TextToVideo

    return TextToVideo(OpenSora(options))


#: A config.json that leaves one out means the default of transformers, which is the library's to know.
_T5_SIZES = {"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"}


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the text-to-video pipeline."""
    from movd.options import MovdOptions

    return [Choice("movd", _pipeline, MovdOptions, summary="text to video with Open-Sora v1.2")]


def _stdit3(config: Mapping[str, Any] | None = None) -> Any:
    import torch

    from movd.stdit3 import STDiT3, STDiT3Config

    with torch.device("meta"):
        return STDiT3(STDiT3Config(**(STDIT3_XL_2 if config is None else config)))


def _vae(config: Mapping[str, Any] | None = None) -> Any:
    import torch

    from movd.vae import OpenSoraVAE, OpenSoraVAEConfig

    with torch.device("meta"):
        return OpenSoraVAE(OpenSoraVAEConfig(**(OPENSORA_VAE if config is None else config)))


def _t5(config: Mapping[str, Any] = T5_V1_1_XXL) -> Any:
    import torch

    from movd.t5 import t5_encoder

    with torch.device("meta"):
        return t5_encoder(config)


def _is_stdit3(config: Mapping[str, Any]) -> Any:
    return _stdit3(config) if {"input_sq_size", "caption_channels"} <= config.keys() else None


def _is_vae(config: Mapping[str, Any]) -> Any:
    named = {"spatial", "temporal"} <= config.keys() or {"vae_2d", "vae_temporal"} <= config.keys()
    return _vae(config) if named else None


def _is_t5(config: Mapping[str, Any]) -> Any:
    named = config.get("model_type") == "t5" and config.get("architectures") == ["T5EncoderModel"]
    return _t5(config) if named and config.keys() >= _T5_SIZES else None


def _stand_in_tokenizer(folder: Path) -> None:
    from movd.tokenizer import write_stand_in

    write_stand_in(folder)


@hookimpl
def model_families() -> Sequence[ModelFamily]:
    """List Open-Sora v1.2's networks in their full size."""
    return [
        ModelFamily(
            "stdit3-xl-2",
            _stdit3,
            summary="STDiT3-XL/2, 1.2 B parameters",
            config=STDIT3_XL_2,
            from_config=_is_stdit3,
        ),
        ModelFamily(
            "opensora-vae",
            _vae,
            summary="OpenSora VAE v1.2, 0.39 B parameters",
            config=OPENSORA_VAE,
            from_config=_is_vae,
        ),
        ModelFamily(
            "t5-v1_1-xxl",
            _t5,
            summary="T5 v1.1 XXL encoder, 4.8 B parameters",
            config={**T5_V1_1_XXL, "architectures": ["T5EncoderModel"]},
            from_config=_is_t5,
            write_extras=_stand_in_tokenizer,
        ),
    ]
