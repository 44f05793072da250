"""Find the coded weights of a checkpoint by a table of formats, each then one tensor of its own shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .formats import Format
from .read.catalog import Checkpoint
from .read.entries import TensorEntry, Tensors, unreadable
from .read.quantised import quantisation, refuse_quantised

#: What weights that are not coded are in.
COMPUTED = ("F64", "F32", "F16", "BF16")
#: The most bytes that are read of a tensor that says how others are coded.
MOST_READ_NBYTES = 1 << 16


def recognised(checkpoint: Checkpoint, formats: Sequence[Format]) -> Checkpoint:
    """Return a checkpoint whose coded weights are one entry each, their companions gone from the others.

    Raises CheckpointError where its config.json names a `quant_method` that no row reads, or one of which no
    row finds a weight.
    """
    settings = quantisation(checkpoint.root)
    method = "" if settings is None else str(settings.get("quant_method", "?"))
    known = [f for f in formats if method in f.methods]
    if settings is not None and not known:
        raise refuse_quantised(checkpoint.root, settings)
    tensors = Tensors(checkpoint.entries, settings or {}, read_small)
    entries = dict(checkpoint.entries)
    found = 0
    for row in formats:
        for entry in () if row.find is None else row.find(tensors):
            assert entry.coded is not None, f"format {row.name!r} yields a weight that is not coded"
            for name in (entry.coded.stored, *entry.coded.dropped):
                entries.pop(name, None)
            for beside in entry.coded.beside.values():
                entries.pop(beside.name, None)
            entries[entry.name] = replace(entry, dtype=row.name, coded=replace(entry.coded, row=row))
            found += row in known
    if settings is not None and not found:
        plain = all(entry.dtype in COMPUTED for entry in checkpoint.entries.values())
        raise refuse_quantised(checkpoint.root, settings, plain)
    return (
        replace(checkpoint, entries=entries)
        if len(entries) < len(checkpoint.entries) or found
        else checkpoint
    )


def read_small(entry: TensorEntry) -> bytes:
    """Return the bytes of a small tensor, read through the page cache, or from wherever its file lies."""
    if entry.nbytes > MOST_READ_NBYTES:
        raise CheckpointError(
            f"{entry.file.path}: {entry.name!r} has {entry.nbytes} bytes, and at most {MOST_READ_NBYTES} are "
            "read of a tensor that says how others are coded; fetch the file again"
        )
    if entry.file.source is not None:
        into = bytearray(entry.nbytes)
        entry.file.source.read(entry.file, entry.offset, memoryview(into))
        return bytes(into)
    try:
        with regular.opened(entry.file.path) as stream:
            stream.seek(entry.offset)
            data: bytes = stream.read(entry.nbytes)
    except OSError as error:
        raise unreadable(entry.file.path, error) from error
    return data
