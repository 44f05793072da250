"""HunyuanVideo and Pyramidal Flow folders as they are published, at tiny size, weights a formula."""

import json

import torch
from safetensors.torch import save_file

from movd.hunyuan.autoencoder import hunyuan_vae
from movd.hunyuan.denoiser import hunyuan_denoiser
from movd.pyramid.causal_vae import CausalVAEConfig, CausalVideoVAE
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig
from movd.t5 import t5_encoder
from movd.tokenizer import word_tokenizer_json
from tests.support import families_tiny as tiny
from tests.support.movd_models import T5
from tests.support.movd_tiny import filled

WORDS = {
    *("a", "red", "blue", "green", "star", "circle", "square", "moving", "left", "right", "up", "down"),
    *("slowly", "quickly", "on", "black"),
}


def write_hunyuan(folder):
    """Write a folder as hunyuanvideo-community/HunyuanVideo; return the keys of a config that name it."""
    from transformers import LlamaConfig, LlamaModel

    own = {k: v for k, v in tiny.LLAMA.items() if k != "model_type"}
    llama = filled(LlamaModel(LlamaConfig(**own)))
    _write(folder / "text_encoder", {**tiny.LLAMA, "architectures": ["LlamaModel"]}, llama.state_dict())
    write_clip(folder / "text_encoder_2")
    _write(
        folder / "transformer",
        tiny.HUNYUAN,
        filled(hunyuan_denoiser(tiny.HUNYUAN)).state_dict(),
        "diffusion_pytorch_model.safetensors",
    )
    _write(
        folder / "vae",
        tiny.HUNYUAN_VAE,
        filled(hunyuan_vae(tiny.HUNYUAN_VAE)).state_dict(),
        "diffusion_pytorch_model.safetensors",
    )
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return {"model": str(folder)}


def write_pyramid(folder):
    """Write a folder as rain1011/pyramid-flow-miniflux; return the keys of a config that name it."""
    t5 = {**T5, "architectures": ["T5EncoderModel"]}
    _write(folder / "text_encoder_2", t5, {**_t5_state()})
    write_clip(folder / "text_encoder")
    for size in ("384p", "768p"):
        _write(
            folder / f"diffusion_transformer_{size}",
            tiny.MINIFLUX,
            filled(MiniFlux(MiniFluxConfig(**tiny.MINIFLUX))).state_dict(),
            "diffusion_pytorch_model.safetensors",
        )
    vae = filled(CausalVideoVAE(CausalVAEConfig(**tiny.CAUSAL_VAE)))
    (folder / "causal_video_vae").mkdir()
    (folder / "causal_video_vae" / "config.json").write_text(json.dumps(tiny.CAUSAL_VAE))
    torch.save(dict(vae.state_dict()), folder / "causal_video_vae" / "diffusion_pytorch_model.bin")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    return {"model": str(folder)}


def _t5_state():
    state = filled(t5_encoder(T5)).state_dict()
    return {name: value for name, value in state.items() if name != "encoder.embed_tokens.weight"}


def write_clip(folder):
    """Write CLIP's text half with the keys of a checkpoint, which say `text_model.` before each."""
    state = {
        "text_model." + name.removeprefix("text_model."): v for name, v in tiny.clip().state_dict().items()
    }
    state["text_model.embeddings.position_ids"] = torch.arange(tiny.CLIP["max_position_embeddings"])[None]
    _write(folder, tiny.CLIP, state)


def write_tokenizer(folder):
    """Write a tokenizer.json with one token a word."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(word_tokenizer_json(sorted(WORDS)))


def _write(folder, config, state, name="model.safetensors"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / name)
