"""What HunyuanVideo offers to blockstream: the pipeline, its networks in full size. Found by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockstream.plugins import Choice, ModelFamily, hookimpl
from movd.hunyuan.hunyuan_released import HUNYUAN_VAE, HUNYUAN_VIDEO, LLAVA_LLAMA_3_8B
from movd.released import CLIP_L


def _pipeline(options: Any) -> Any:
    from movd.hunyuan.hunyuan_video import HunyuanVideo
    from movd.text_to_video.pipeline import TextToVideo

    return TextToVideo(HunyuanVideo(options))


@hookimpl
def pipelines() -> Sequence[Choice]:
    """List the text-to-video pipeline."""
    from movd.hunyuan.hunyuan_options import HunyuanOptions

    return [Choice("hunyuan-video", _pipeline, HunyuanOptions, summary="text to video with HunyuanVideo")]


def _dit(config: Mapping[str, Any] = HUNYUAN_VIDEO) -> Any:
    import torch

    from movd.hunyuan.denoiser import hunyuan_denoiser

    with torch.device("meta"):
        return hunyuan_denoiser(config)


def _vae(config: Mapping[str, Any] = HUNYUAN_VAE) -> Any:
    import torch

    from movd.hunyuan.autoencoder import hunyuan_vae

    with torch.device("meta"):
        return hunyuan_vae(config)


def _llama(config: Mapping[str, Any] = LLAVA_LLAMA_3_8B) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaModel

    own = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        return LlamaModel(LlamaConfig(**own)).eval()


def _clip(config: Mapping[str, Any] = CLIP_L) -> Any:
    import torch

    from movd.clip import clip_text_model

    with torch.device("meta"):
        return clip_text_model(config)


def _stand_in_tokenizer(folder: Path) -> None:
    """Write a small tokenizer.json into a folder of synthetic weights: it splits text, and means nothing."""
    from movd.tokenizer import word_tokenizer_json

    letters = "abcdefghijklmnopqrstuvwxyz"
    (folder / "tokenizer.json").write_text(
        word_tokenizer_json(a + b for a in letters for b in letters) + "\n"
    )


@hookimpl
def model_families() -> Sequence[ModelFamily]:
    """List HunyuanVideo's networks in their full size."""
    return [
        ModelFamily(
            "hunyuan-video-dit", _dit, summary="HunyuanVideo's DiT, 12.8 B parameters", config=HUNYUAN_VIDEO
        ),
        ModelFamily(
            "hunyuan-video-vae", _vae, summary="HunyuanVideo's VAE, 0.25 B parameters", config=HUNYUAN_VAE
        ),
        ModelFamily(
            "llava-llama-3-8b",
            _llama,
            summary="the LLaMA of HunyuanVideo, 8.0 B parameters",
            config={**LLAVA_LLAMA_3_8B, "architectures": ["LlamaModel"]},
            write_extras=_stand_in_tokenizer,
        ),
        ModelFamily(
            "clip-vit-l-text",
            _clip,
            summary="CLIP-L's text half, 0.12 B parameters",
            config={**CLIP_L, "architectures": ["CLIPTextModel"]},
            write_extras=_stand_in_tokenizer,
        ),
    ]
