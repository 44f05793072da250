"""Pyramidal Flow's networks in their full size, as their config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: rain1011/pyramid-flow-miniflux diffusion_transformer_*: 1.97 B parameters.
MINIFLUX: Mapping[str, Any] = {
    "_class_name": "PyramidFluxTransformer",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 8,
    "num_single_layers": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 30,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 24, 24],
}
#: rain1011/pyramid-flow-miniflux causal_video_vae: 335 M parameters; its numbers are the defaults of the
#: class.
CAUSAL_VAE: Mapping[str, Any] = {"_class_name": "CausalVideoVAE"}
