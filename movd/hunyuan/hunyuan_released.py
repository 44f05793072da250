"""HunyuanVideo's networks in their full size, as their config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The language half of xtuner/llava-llama-3-8b, as HunyuanVideo ships it: 8.0 B parameters, 7.5 B of them
#: run.
LLAVA_LLAMA_3_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

#: hunyuanvideo-community/HunyuanVideo transformer/: 12.8 B parameters; the class's own defaults.
HUNYUAN_VIDEO: Mapping[str, Any] = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56],
}

#: hunyuanvideo-community/HunyuanVideo vae/: 246 M parameters; the class's own defaults.
HUNYUAN_VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
    "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}
