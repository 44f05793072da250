"""The encoders that the benchmarks run: the layout of a T5 v1.1 encoder, bf16, random weights.

"full" is as wide as XXL with 12 blocks of 386 MB, 4.63 GB, and an embedding of 263 MB that is read by row;
"deep" has 28 blocks of 96 MB, "long" 52 and "medium" 12 of them, "narrow" 24 blocks of 26 MB; "small", 12
blocks of some 6 MB, is for trying a script out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.manifest import MANIFEST_NAME
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.module.empty import empty

_XL = {"d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120}
SIZES = {
    #: The shape of google/t5-v1_1-xxl's encoder, half as deep.
    "full": {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 12},
    "deep": {**_XL, "num_layers": 28},
    "long": {**_XL, "num_layers": 52},
    "medium": {**_XL, "num_layers": 12},
    "narrow": {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 2816, "num_layers": 24},
    #: Its embedding is no table to read rows of.
    "plain": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1280, "num_layers": 12, "vocab_size": 1024},
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1280, "num_layers": 12},
}
TOKENS = 128
SHARD_NBYTES = 2 << 30


def config(size: str) -> Any:
    """Return the configuration of an encoder."""
    from transformers import T5Config

    return T5Config(
        **{"vocab_size": 32128, **SIZES[size]},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )


def build(folder: Path) -> nn.Module:
    """Return the encoder of a folder, in evaluation mode; the caller says where its weights come from."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config.from_pretrained(folder)).eval()


def checkpoint(folder: Path, size: str = "full", blocks: int | None = None) -> Path:
    """Return a folder as users have it (config.json, safetensors shards), written the first time.

    `blocks` of that size, where it is not its own number of them.
    """
    if not (folder / "config.json").exists():
        from transformers import T5EncoderModel

        shape = config(size)
        shape.num_layers = blocks or shape.num_layers
        with empty():
            module = T5EncoderModel(shape)
        shared = {"encoder.embed_tokens.weight"}
        spec = {n: ("BF16", tuple(t.shape)) for n, t in module.state_dict().items() if n not in shared}
        note = {"of": f"a T5 v1.1 encoder, {shape.num_layers} blocks {shape.d_model} wide"}
        synthesise(spec, folder, shard_nbytes=SHARD_NBYTES, note=note)
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


def packed(folder: Path, dtype: str | None = None) -> Path:
    """Return the folder that `blockstream pack` makes of an encoder's, written the first time."""
    from blockstream.cli.main import main

    into = folder / (dtype or "packed")
    how = ["--dtype", dtype] if dtype else []
    if not (into / MANIFEST_NAME).exists() and main(["pack", str(folder), str(into), *how]):
        raise OSError(f"{into} could not be packed")
    return into


def files(folder: Path) -> list[Path]:
    """Return the files of weights."""
    return sorted(folder.glob("*.safetensors"))
