"""The tiny text side of both families: one word-level tokenizer, a LLaMA, a CLIP, a T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from examples.train_tiny import text
from movd.clip import CLIPTokenizer, clip_text_model
from movd.hunyuan.llama import PromptTokenizer, llama_encoder
from movd.t5 import t5_encoder
from movd.tokenizer import load_tokenizer, word_tokenizer_json

WIDTH = 128
VOCABULARY = len(text.WORDS) + 3
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaModel"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": text.MAX_TOKENS,
    "hidden_act": "quick_gelu",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
#: Where the encoders and their tokenizers lie in a family's folder.
FOLDERS = {
    "hunyuan": {"main": ("text_encoder", "tokenizer"), "clip": ("text_encoder_2", "tokenizer_2")},
    "pyramid": {"main": ("text_encoder_2", "tokenizer_2"), "clip": ("text_encoder", "tokenizer")},
}


def build(family: str) -> tuple[nn.Module, nn.Module]:
    """Return the first encoder and CLIP, untrained."""
    main = llama_encoder(LLAMA) if family == "hunyuan" else t5_encoder(text.CONFIG)
    return main, clip_text_model(CLIP)


def write_tokenizers(family: str, folder: Path) -> tuple[Any, CLIPTokenizer]:
    """Write both tokenizers into a family's folder; return them as its pipeline reads them."""
    for _, name in FOLDERS[family].values():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "tokenizer.json").write_text(word_tokenizer_json(text.WORDS) + "\n")
    main = folder / FOLDERS[family]["main"][1]
    words = CLIPTokenizer(folder / FOLDERS[family]["clip"][1], CLIP["max_position_embeddings"])
    if family == "hunyuan":
        return PromptTokenizer(main, VOCABULARY, text.MAX_TOKENS), words
    return load_tokenizer(main, text.MAX_TOKENS), words


def save(family: str, folder: Path, main: nn.Module, clip: nn.Module) -> None:
    """Write both encoders' folders."""
    configs = {"main": LLAMA if family == "hunyuan" else {**text.CONFIG, "architectures": ["T5EncoderModel"]}}
    for name, module in (("main", main), ("clip", clip)):
        own = folder / FOLDERS[family][name][0]
        own.mkdir(parents=True, exist_ok=True)
        (own / "config.json").write_text(json.dumps(configs.get(name, CLIP), indent=2) + "\n")
        tensors = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
        tensors.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        save_file(tensors, own / "model.safetensors", {"format": "pt"})
