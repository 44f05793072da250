"""Give the tensors of a GGUF file the names that transformers gives them, and say what it makes of them.

The names are those of its own table. What it does to the numbers besides (queries and keys put back in the
order of their halves, norms less one, matrices turned) is said of each weight, and done as it is widened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.checkpoint.formats import TABLE, by_name
from blockstream.checkpoint.read.entries import Coded
from blockstream.errors import CheckpointError

from .libraries import library_of

#: Names of the matrices that GPT-2 has the other way round, in a GGUF file.
_TURNED = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


def renamed(module: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Return a GGUF checkpoint with the names its library gives; as it is for modules of other libraries.

    Raises CheckpointError for an architecture whose weights are made by arithmetic that is not done here.
    """
    if checkpoint.form != "gguf" or library_of(module) != "transformers":
        return checkpoint
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = checkpoint.architecture
    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    change = _CHANGES.get(kind.__name__)
    if change is None:
        raise CheckpointError(
            f"{checkpoint.root}: is a GGUF file of architecture {architecture!r}, whose weights transformers "
            f"computes ({kind.__name__}); use the original checkpoint in safetensors"
        )
    try:
        names: Mapping[str, str] = get_gguf_hf_weights_map(module, kind(config={}))  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise CheckpointError(
            f"{checkpoint.root}: is a GGUF file of architecture {architecture!r}, and the package gguf has "
            f"no names for {type(module).__name__}; upgrade it, or use the original checkpoint"
        ) from error
    entries = {}
    for name, entry in checkpoint.entries.items():
        target = names.get(name, "lm_head.weight" if name == "output.weight" else name)
        entries[target] = replace(change(entry, module.config), name=target)
    return replace(checkpoint, entries=entries)


def _as_it_is(entry: TensorEntry, config: Any) -> TensorEntry:
    return entry


def _halved(entry: TensorEntry, config: Any) -> TensorEntry:
    """Say how many heads the rows of a query or key belong to: they are stored by pairs."""
    query, key = ".attn_q." in entry.name, ".attn_k." in entry.name
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return _about(entry, heads=heads if query else groups) if (query or key) and heads else entry


def _less_one(entry: TensorEntry, config: Any) -> TensorEntry:
    return _about(entry, add=-1.0) if "norm.weight" in entry.name else entry


def _turned(entry: TensorEntry, config: Any) -> TensorEntry:
    if not any(name in entry.name for name in _TURNED):
        return entry
    return replace(_about(entry, transposed=True), shape=entry.shape[::-1])


#: What transformers' class of an architecture does to its weights.
_CHANGES = {
    "TensorProcessor": _as_it_is,
    "T5TensorProcessor": _as_it_is,
    "LlamaTensorProcessor": _halved,
    "NemotronTensorProcessor": _less_one,
    "Gemma2TensorProcessor": _less_one,
    "GPT2TensorProcessor": _turned,
}


def _about(entry: TensorEntry, **about: Any) -> TensorEntry:
    """Return a tensor with what is made of its numbers; plain ones are coded from then on."""
    if entry.coded is not None:
        return replace(entry, coded=replace(entry.coded, about=about))
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{entry.file.path}: {entry.name!r} is {entry.dtype}, which is not read")
    row = by_name(TABLE)[f"GGUF-{entry.dtype}"]
    return replace(entry, dtype=row.name, coded=Coded(entry.name, about=about, row=row))
