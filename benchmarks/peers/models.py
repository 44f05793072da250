"""The four networks, their inputs, and their checkpoints of random numbers.

`small` networks have the same structure and a few megabytes, for trying every contestant out.
Imported by contestants in environments that have torch, transformers, diffusers and no more of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import t5_xxl
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.module.empty import empty
from blockstream.module.spec import tensor_spec

SHARD_NBYTES = 2 << 30
DTYPES = {"bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Model:
    """A network: `config` gives its config.json, `module` builds it, `inputs` are the forward's arguments.

    `lists` are the module lists of its blocks, all inside the submodule `tower` ("" is the network).
    """

    title: str
    dtype: str
    passes: int
    lists: tuple[str, ...]
    config: Callable[[bool], dict[str, Any]]
    module: Callable[[dict[str, Any]], nn.Module]
    inputs: Callable[[dict[str, Any]], dict[str, Any]]
    tower: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]

    def build(self, folder: Path) -> nn.Module:
        """Return the network that a checkpoint's config.json describes, in the dtype of its weights."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.torch_dtype)
        try:
            return self.module(config_of(folder)).eval()
        finally:
            torch.set_default_dtype(before)

    def blocks(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the blocks by name, in the order the network has them."""
        return {
            f"{name}.{i}": block
            for name in self.lists
            for i, block in enumerate(module.get_submodule(name).children())
        }


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration."""
    return dict(json.loads((folder / "config.json").read_text()))


def result(output: Any) -> torch.Tensor:
    """Return the tensor of what a network returned."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("last_hidden_state", "logits", "sample"):
        if (found := getattr(output, name, None)) is not None:
            return torch.as_tensor(found)
    return torch.as_tensor(output[0])


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -- T5-XXL's encoder ----------------------------------------------------------------------------


def _t5_config(small: bool) -> dict[str, Any]:
    shape = t5_xxl.config("small" if small else "full")
    shape.num_layers = 6 if small else 24
    shape.architectures, shape.dtype = ["T5EncoderModel"], "bfloat16"
    return dict(shape.to_diff_dict()) | {"model_type": "t5"}


def _t5(config: dict[str, Any]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def _t5_inputs(config: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": t5_xxl.tokens()}


# -- STDiT3-XL/2, Open-Sora's denoiser -----------------------------------------------------------


def _stdit3_config(small: bool) -> dict[str, Any]:
    shape = {"hidden_size": 144, "depth": 4, "num_heads": 4, "caption_channels": 256} if small else {}
    full = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "caption_channels": 4096}
    return {"architectures": ["STDiT3"], "model_type": "STDiT3", **full, **shape}


def _stdit3(config: dict[str, Any]) -> nn.Module:
    from movd.stdit3 import STDiT3, STDiT3Config

    return STDiT3(STDiT3Config(**config))


def _stdit3_inputs(config: dict[str, Any]) -> dict[str, Any]:
    """Return four latent frames of 128 x 128 pixels: 256 tokens, and 64 of text."""
    return {
        "x": _random(1, 4, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "y": _random(1, 1, 64, config["caption_channels"]),
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([128.0]),
        "width": torch.tensor([128.0]),
    }


# -- a causal language model of Llama's shape -----------------------------------------------------


def _llama_config(small: bool) -> dict[str, Any]:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    if small:
        shape = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "num_hidden_layers": 6 if small else 12,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "dtype": "bfloat16",
    }


def _llama(config: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**config))


def _llama_inputs(config: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": t5_xxl.tokens(), "use_cache": False}


# -- a diffusers DiT of Stable Diffusion 3.5's shape ----------------------------------------------


def _dit_config(small: bool) -> dict[str, Any]:
    heads, layers = (4, 6) if small else (38, 10)
    return {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * heads,
        "joint_attention_dim": 256 if small else 4096,
        "pooled_projection_dim": 2048,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "pos_embed_max_size": 32,
        "sample_size": 32,
        "qk_norm": "rms_norm",
    }


def _dit(config: dict[str, Any]) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return torch.nn.Module.eval(SD3Transformer2DModel.from_config(config))


def _dit_inputs(config: dict[str, Any]) -> dict[str, Any]:
    """Return latents of 256 x 256 pixels, 256 tokens, and 77 of text."""
    bf16 = torch.bfloat16
    return {
        "hidden_states": _random(1, 16, 32, 32).to(bf16),
        "encoder_hidden_states": _random(1, 77, config["joint_attention_dim"]).to(bf16),
        "pooled_projections": _random(1, config["pooled_projection_dim"]).to(bf16),
        "timestep": torch.tensor([500.0], dtype=bf16),
    }


MODELS = {
    "t5": Model(
        "T5-XXL encoder, 24 blocks, bf16",
        "bf16",
        3,
        ("encoder.block",),
        _t5_config,
        _t5,
        _t5_inputs,
        "encoder",
    ),
    "stdit3": Model(
        "STDiT3-XL/2, 28 + 28 blocks, fp32",
        "fp32",
        4,
        ("spatial_blocks", "temporal_blocks"),
        _stdit3_config,
        _stdit3,
        _stdit3_inputs,
    ),
    "llama": Model(
        "Llama shape, 12 layers of 4096, bf16",
        "bf16",
        3,
        ("model.layers",),
        _llama_config,
        _llama,
        _llama_inputs,
        "model",
    ),
    "dit": Model(
        "diffusers SD3 transformer, 10 blocks of 2432, bf16",
        "bf16",
        4,
        ("transformer_blocks",),
        _dit_config,
        _dit,
        _dit_inputs,
    ),
}


def nbytes(name: str) -> int:
    """Return the bytes of a network's weights."""
    model = MODELS[name]
    with empty():
        module = model.module(model.config(False))
    return sum(t.numel() for t in module.state_dict().values()) * model.torch_dtype.itemsize


def checkpoint(name: str, folder: Path, small: bool = False) -> Path:
    """Return a model's folder (config.json, safetensors shards, a tokenizer), written the first time."""
    model = MODELS[name]
    if (folder / "config.json").exists():
        return folder
    config = model.config(small)
    with empty():
        spec = tensor_spec(model.module(config), DTYPES[model.dtype])
    synthesise(spec, folder, shard_nbytes=SHARD_NBYTES, note={"of": model.title})
    if name == "llama":  # AirLLM loads a tokenizer with every model
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
