"""Bytes of checkpoints: headers to extents, direct reads, the packed form. Never imports torch.

In: files, or tensors to write; out: entries, a store of segments, packs.
"""

from blockstream.checkpoint.read.catalog import Checkpoint
from blockstream.checkpoint.read.entries import FileStamp, Source, TensorEntry
from blockstream.checkpoint.read.sourced import header_from

__all__ = ["Checkpoint", "FileStamp", "Source", "TensorEntry", "header_from"]
