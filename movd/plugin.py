"""What movd offers to blockstream: the pipeline and its model families. Found by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockstream.hookspecs import Choice, ModelFamily, hookimpl

#: What the config.json of the released folders says of the networks.
_STDIT3_CONFIG = {
    "model_type": "STDiT3",
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "caption_channels": 4096,
    "model_max_length": 300,
    "input_sq_size": 512,
    "in_channels": 4,
    "patch_size": [1, 2, 2],
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "pred_sigma": True,
    "qk_norm": True,
}
_VAE_CONFIG = {
    "model_type": "VideoAutoencoderPipeline",
    "vae_2d": {},
    "vae_temporal": {},
    "micro_frame_size": 17,
}
_T5_CONFIG = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _pipeline(options: Any) -> Any:
    from movd.pipeline import MovdPipeline

    return MovdPipeline(options)


#: A config.json that leaves one out means the default of transformers, which is the library's to know.
_T5_SIZES = {"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"}


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the text-to-video pipeline."""
    from movd.options import MovdOptions

    return [Choice("movd", _pipeline, MovdOptions, summary="text to video with Open-Sora v1.2")]


def _stdit3(config: Mapping[str, Any] | None = None) -> Any:
    import torch

    from movd.stdit3 import STDIT3_XL_2, STDiT3, STDiT3Config

    with torch.device("meta"):
        return STDiT3(STDIT3_XL_2 if config is None else STDiT3Config(**config))


def _vae(config: Mapping[str, Any] | None = None) -> Any:
    import torch

    from movd.vae import OPENSORA_VAE_V1_2, OpenSoraVAE, OpenSoraVAEConfig

    with torch.device("meta"):
        return OpenSoraVAE(OPENSORA_VAE_V1_2 if config is None else OpenSoraVAEConfig(**config))


def _t5(config: Mapping[str, Any] = _T5_CONFIG) -> Any:
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
            config=_STDIT3_CONFIG,
            from_config=_is_stdit3,
        ),
        ModelFamily(
            "opensora-vae",
            _vae,
            summary="OpenSora VAE v1.2, 0.39 B parameters",
            config=_VAE_CONFIG,
            from_config=_is_vae,
        ),
        ModelFamily(
            "t5-v1_1-xxl",
            _t5,
            summary="T5 v1.1 XXL encoder, 4.8 B parameters",
            config=_T5_CONFIG,
            from_config=_is_t5,
            write_extras=_stand_in_tokenizer,
        ),
    ]
