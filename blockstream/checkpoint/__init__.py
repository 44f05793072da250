"""Bytes of checkpoints: headers to extents, direct reads, the packed form. Never imports torch.

In: files, or tensors to write; out: entries, a store of segments, packs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blockstream.checkpoint.read.entries import FileStamp, Source, TensorEntry

if TYPE_CHECKING:
    from blockstream.checkpoint.read.catalog import Checkpoint
    from blockstream.checkpoint.read.sourced import header_from

__all__ = ["Checkpoint", "FileStamp", "Source", "TensorEntry", "header_from"]

_LAZY = {"Checkpoint": "read.catalog", "header_from": "read.sourced"}


def __getattr__(name: str) -> Any:
    """Import what reads manifests on first use: plugins need the values alone, and help nothing heavy."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
