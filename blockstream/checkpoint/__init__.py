"""Bytes of checkpoints: headers to extents, direct reads, the packed form. Never imports torch."""

from .catalog import Checkpoint
from .entries import FileStamp, TensorEntry

__all__ = ["Checkpoint", "FileStamp", "TensorEntry"]
