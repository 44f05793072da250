"""The text encoder: transformers' T5EncoderModel, built from its configuration and never downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blockstream.errors import ConfigError
from movd.released import T5_V1_1_XXL
from movd.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import T5EncoderModel

_NEEDED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the config.json of another model than T5."""
    kind = config.get("model_type", "t5")
    if kind != "t5":
        raise ConfigError(f"model_type {kind!r} is not 't5'; Open-Sora v1.2 uses DeepFloyd/t5-v1_1-xxl")
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ConfigError(f"a T5 configuration needs {missing}")


def t5_encoder(config: Mapping[str, Any]) -> T5EncoderModel:
    """Build the encoder of a config.json, in eval mode; its attention is the plain one in every version.

    Build it under `torch.device("meta")` to spend no memory. Raises ConfigError for another model.
    """
    from transformers import T5Config, T5EncoderModel

    check_config(config)
    # The decoder's part is not built; generation settings would only make transformers warn.
    own = {name: config[name] for name in T5_V1_1_XXL if name in config and name != "model_type"}
    built = T5Config(**own, is_encoder_decoder=False, use_cache=False, attn_implementation="eager")
    return T5EncoderModel(built).eval()


@torch.no_grad()
def embed(
    model: T5EncoderModel, tokenizer: Tokenizer, texts: Sequence[str], device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return y [B, 1, L, d_model] and mask [B, L]: every position, padding included, and which are real."""
    ids, mask = (tensor.to(device) for tensor in tokenizer.encode(texts))
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[:, None], mask
