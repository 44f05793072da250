"""Small model folders, as transformers leaves them."""

from __future__ import annotations

import json
from pathlib import Path

T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "dtype": "float32",
}


def t5_config(folder: Path, **changes: object) -> Path:
    """Write the config.json of a small T5 encoder; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**T5, **changes}))
    return folder


def t5_folder(folder: Path, **changes: object) -> Path:
    """Save a small T5 encoder with weights from a fixed seed; return the folder."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    T5EncoderModel(T5Config(**{**T5, **changes})).save_pretrained(folder)
    t5_config(folder, **changes)
    return folder
