"""The encoder that the full-size benchmarks run: as wide as T5 v1.1 XXL, 12 blocks, bf16, random weights.

A block is 386 MB, all twelve 4.63 GB; the embedding of 263 MB is read by row. `small` is a network of
the same shape of some 10 MB, for trying a script out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.synth import synthesise
from blockstream.nn.empty import empty

#: The shape of google/t5-v1_1-xxl's encoder, half as deep.
FULL = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 12, "vocab_size": 32128}
SMALL = {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1280, "num_layers": 12, "vocab_size": 32128}
TOKENS = 128
SHARD_NBYTES = 2 << 30


def config(small: bool = False) -> Any:
    """Return the configuration of the encoder."""
    from transformers import T5Config

    return T5Config(
        **(SMALL if small else FULL),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )


def build(small: bool = False) -> nn.Module:
    """Return the encoder, in evaluation mode."""
    from transformers import T5EncoderModel

    return T5EncoderModel(config(small)).eval()


def checkpoint(folder: Path, small: bool = False) -> Path:
    """Return a folder as users have it (config.json, safetensors shards), written the first time."""
    if not (folder / "config.json").exists():
        with empty():
            module = build(small)
        shared = {"encoder.embed_tokens.weight"}
        spec = {n: ("BF16", tuple(t.shape)) for n, t in module.state_dict().items() if n not in shared}
        synthesise(spec, folder, shard_nbytes=SHARD_NBYTES, note={"of": "a T5 v1.1 XXL encoder of 12 blocks"})
        shape = config(small)
        shape.architectures, shape.dtype = ["T5EncoderModel"], "bfloat16"
        shape.save_pretrained(folder)
    return folder


def block_nbytes(folder: Path) -> int:
    """Return the bytes of one block's tensors."""
    entries = Checkpoint.open(folder).entries.items()
    return sum(e.nbytes for n, e in entries if n.startswith("encoder.block.1."))


def tokens(count: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Return ids of shape [1, count]."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 32000, (1, count), generator=made)


def files(folder: Path) -> list[Path]:
    """Return the files of weights."""
    return sorted(folder.glob("*.safetensors"))
