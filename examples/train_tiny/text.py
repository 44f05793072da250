"""Make the tiny text side: a word-level tokenizer and the configuration of a T5 encoder of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from examples.train_tiny import data
from examples.train_tiny.data import Scene
from movd.tokenizer import Tokenizer, load_tokenizer, word_tokenizer_json

MAX_TOKENS = 24

# What Open-Sora adds to a prompt; the model learns to look past words it does not know.
SUFFIX = " aesthetic score: 6.5."

WORDS = sorted({word for scene in data.scenes() for word in scene.caption().split()})

CONFIG = {
    "model_type": "t5",
    "vocab_size": len(WORDS) + 3,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def write(folder: Path) -> Tokenizer:
    """Write config.json and tokenizer.json of the encoder; return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(word_tokenizer_json(WORDS) + "\n")
    return load_tokenizer(folder, MAX_TOKENS)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption: 30% say nothing of the background, 10% end in words of no meaning."""
    caption = scene.caption(background=rng.random() >= 0.3)
    return caption + SUFFIX if rng.random() < 0.1 else caption
