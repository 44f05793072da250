"""Bytes of checkpoints: headers to extents, direct reads, the packed form. Never imports torch.

In: files, or tensors to write; out: entries, a store of segments, packs.
"""

from typing import TYPE_CHECKING, Any

from blockstream.checkpoint.read.entries import FileStamp, Source, TensorEntry

if TYPE_CHECKING:
    from blockstream.checkpoint.read.catalog import Checkpoint

__all__ = ["Checkpoint", "FileStamp", "Source", "TensorEntry", "header_from"]


def __getattr__(name: str) -> Any:
    """Import the catalogue on first use: what formats are made of is needed without it."""
    if name != "Checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blockstream.checkpoint.read.catalog import Checkpoint

    return Checkpoint
