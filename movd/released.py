"""The released networks in their full size, as their config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: hpcai-tech/OpenSora-STDiT-v3: 1.21 B parameters.
STDIT3_XL_2: Mapping[str, Any] = {
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
#: hpcai-tech/OpenSora-VAE-v1.2: 393.4 M parameters; its numbers are the defaults of the class.
OPENSORA_VAE: Mapping[str, Any] = {
    "model_type": "VideoAutoencoderPipeline",
    "vae_2d": {},
    "vae_temporal": {},
    "micro_frame_size": 17,
}
#: DeepFloyd/t5-v1_1-xxl: 4.76 B parameters in the encoder.
T5_V1_1_XXL: Mapping[str, Any] = {
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
#: openai/clip-vit-large-patch14's text half: 123 M parameters.
CLIP_L: Mapping[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
