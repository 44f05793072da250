"""Small HunyuanVideo and Pyramidal Flow networks, their weights a formula, so that they never change."""

import torch

from movd.clip import clip_text_model
from movd.hunyuan.autoencoder import HunyuanDecoder
from movd.hunyuan.denoiser import hunyuan_denoiser
from movd.hunyuan.guided import Prompt
from movd.hunyuan.llama import llama_encoder
from movd.pyramid.causal_vae import CausalVAEConfig, PyramidDecoder, PyramidEncoder
from movd.pyramid.legs import Words
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig
from tests.support.movd_tiny import filled, noise

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 64,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 12,
    "rope_axes_dim": [4, 6, 6],
}
HUNYUAN_VAE = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "latent_channels": 4,
    "block_out_channels": [4, 4, 8, 8],
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
MINIFLUX = {
    "_class_name": "PyramidFluxTransformer",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 12,
    "axes_dims_rope": [4, 6, 6],
}
CAUSAL_VAE = {
    "_class_name": "CausalVideoVAE",
    "encoder_out_channels": 4,
    "encoder_layers_per_block": [1, 1, 1, 1],
    "encoder_block_out_channels": [4, 4, 8, 8],
    "encoder_norm_num_groups": 2,
    "decoder_in_channels": 4,
    "decoder_layers_per_block": [1, 1, 1, 1],
    "decoder_block_out_channels": [4, 4, 8, 8],
    "decoder_norm_num_groups": 2,
}


def llama():
    return filled(llama_encoder(LLAMA))


def clip():
    return filled(clip_text_model(CLIP))


def hunyuan(**more):
    return filled(hunyuan_denoiser({**HUNYUAN, **more}))


def hunyuan_vae():
    return filled(HunyuanDecoder(HUNYUAN_VAE).eval())


def miniflux():
    return filled(MiniFlux(MiniFluxConfig(**MINIFLUX)).eval())


def pyramid_decoder():
    return filled(PyramidDecoder(CausalVAEConfig(**CAUSAL_VAE)).eval())


def pyramid_encoder():
    return filled(PyramidEncoder(CausalVAEConfig(**CAUSAL_VAE)).eval())


def prompt(key=0, length=5, of=7):
    mask = (torch.arange(of) < length).long()[None]
    return Prompt(noise(1, of, 16, key=key + 11), mask, noise(1, 12, key=key + 12))


def words(key=0, length=5, of=7):
    return Words(*prompt(key, length, of))


def hunyuan_inputs(frames=5, height=4, width=6):
    """Return keyword arguments of a HunyuanVideo forward."""
    given = prompt()
    return {
        "hidden_states": noise(1, 4, frames, height, width, key=1),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": given.states,
        "encoder_attention_mask": given.mask,
        "pooled_projections": given.pooled,
        "guidance": torch.tensor([6000.0]),
    }
