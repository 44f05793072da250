"""Architectures of transformers and diffusers with tiny configs, and inputs for their forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Animal(NamedTuple):
    """One architecture: a factory of a small model with random weights, and keyword arguments for it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], Mapping[str, Any]]


#: What text models call the same setting, and a small value of it.
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "embedding_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "dim": 32,
    "n_heads": 4,
    "n_layers": 3,
    "hidden_dim": 64,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "ffn_hidden_size": 64,
    "multi_query": True,
    "new_decoder_architecture": False,
    "rotary_pct": 0.5,
    "partial_rotary_factor": 0.5,
}


def text(name: str, decoder: bool = False, **more: Any) -> Animal:
    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        known = cls.config_class().to_dict()
        settings = {k: v for k, v in {**_TEXT, **more}.items() if k in known or k in more}
        return cls(cls.config_class(**settings))

    def inputs(dtype: torch.dtype) -> Mapping[str, Any]:
        ids = torch.arange(3, 12)[None]
        return {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if decoder else {})}

    return Animal(make, inputs)


def _image(name: str, **more: Any) -> Animal:
    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(**more))

    def inputs(dtype: torch.dtype) -> Mapping[str, Any]:
        return {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).to(dtype)}

    return Animal(make, inputs)


TRANSFORMERS: dict[str, Animal] = {
    **{
        name: text(name)
        for name in (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "PhiForCausalLM",
            "GPT2LMHeadModel",
            "GPTNeoXForCausalLM",
            "GPTJForCausalLM",
            "OPTForCausalLM",
            "BloomForCausalLM",
            "FalconForCausalLM",
            "MixtralForCausalLM",
            "BertModel",
            "RobertaModel",
            "DistilBertModel",
            "AlbertModel",
            "ElectraModel",
            "DebertaV2Model",
            "XLMRobertaModel",
            "Starcoder2ForCausalLM",
            "OlmoForCausalLM",
            "CohereForCausalLM",
            "StableLmForCausalLM",
        )
    },
    "T5EncoderModel": text("T5EncoderModel", feed_forward_proj="gated-gelu"),
    "T5ForConditionalGeneration": text("T5ForConditionalGeneration", decoder=True),
    "BartForConditionalGeneration": text("BartForConditionalGeneration", decoder=True),
    "MarianMTModel": text("MarianMTModel", decoder=True),
    "PegasusForConditionalGeneration": text("PegasusForConditionalGeneration", decoder=True),
    "CLIPTextModel": text("CLIPTextModel"),
    "ResNetForImageClassification": _image(
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
    ),
    "ViTModel": _image(
        "ViTModel",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    ),
    "SiglipVisionModel": _image(
        "SiglipVisionModel",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    ),
}


def _diffusers(name: str, settings: Mapping[str, Any], **shapes: Any) -> Animal:
    """Return a model of diffusers; inputs are shapes of noise, or values that stay as they are."""

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**settings)

    def inputs(dtype: torch.dtype) -> Mapping[str, Any]:
        torch.manual_seed(1)
        made = {
            key: torch.randn(*value).to(dtype) if isinstance(value, tuple) else value
            for key, value in shapes.items()
        }
        return {**made, "return_dict": False}

    return Animal(make, inputs)


_CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_STEP = torch.tensor([3])
DIFFUSERS: dict[str, Animal] = {
    "WanTransformer3DModel": _diffusers(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        },
        hidden_states=(1, 4, 2, 8, 8),
        timestep=_STEP,
        encoder_hidden_states=(1, 6, 16),
    ),
    "FluxTransformer2DModel": _diffusers(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        hidden_states=(1, 16, 4),
        encoder_hidden_states=(1, 6, 16),
        pooled_projections=(1, 16),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(6, 3),
    ),
    "SD3Transformer2DModel": _diffusers(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        hidden_states=(1, 4, 8, 8),
        encoder_hidden_states=(1, 6, 16),
        pooled_projections=(1, 16),
        timestep=_STEP,
    ),
    "UNet2DConditionModel": _diffusers(
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            **_CROSS,
        },
        sample=(1, 4, 8, 8),
        timestep=3,
        encoder_hidden_states=(1, 6, 16),
    ),
    "AutoencoderKL": _diffusers(
        "AutoencoderKL",
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        sample=(1, 3, 16, 16),
    ),
    "DiTTransformer2DModel": _diffusers(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 4,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        hidden_states=(1, 4, 8, 8),
        timestep=_STEP,
        class_labels=torch.tensor([1]),
    ),
    "PixArtTransformer2DModel": _diffusers(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        hidden_states=(1, 4, 8, 8),
        encoder_hidden_states=(1, 6, 16),
        timestep=_STEP,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ),
    "CogVideoXTransformer3DModel": _diffusers(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 6,
        },
        hidden_states=(1, 2, 4, 8, 8),
        encoder_hidden_states=(1, 6, 16),
        timestep=_STEP,
    ),
    "LTXVideoTransformer3DModel": _diffusers(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 16,
        },
        hidden_states=(1, 32, 8),
        encoder_hidden_states=(1, 6, 16),
        timestep=_STEP,
        encoder_attention_mask=torch.ones(1, 6),
        num_frames=2,
        height=4,
        width=4,
    ),
    "AuraFlowTransformer2DModel": _diffusers(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        hidden_states=(1, 4, 8, 8),
        encoder_hidden_states=(1, 6, 16),
        timestep=torch.tensor([0.5]),
    ),
    "SanaTransformer2DModel": _diffusers(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        hidden_states=(1, 4, 8, 8),
        encoder_hidden_states=(1, 6, 16),
        timestep=_STEP,
    ),
    "VQModel": _diffusers(
        "VQModel",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 3,
            "norm_num_groups": 4,
        },
        sample=(1, 3, 16, 16),
    ),
}
