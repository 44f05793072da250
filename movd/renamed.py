"""Checkpoints under other names: what a file calls a tensor, and a part of one, as a module calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.errors import CheckpointError


def renamed(checkpoint: Checkpoint, name_of: Callable[[str], str | None]) -> Checkpoint:
    """Return a checkpoint whose tensors carry other names; those named None are left out."""
    named = {name_of(name): entry for name, entry in checkpoint.entries.items()}
    return replace(checkpoint, entries={name: entry for name, entry in named.items() if name is not None})


def rows(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Return rows `start` to `stop` of a tensor's first dimension, as an entry of its own."""
    whole = entry.shape[0]
    if not 0 <= start <= stop <= whole:
        raise CheckpointError(
            f"{entry.file.path}: {entry.name!r} has {whole} rows, rows {start} to {stop} are asked for; "
            "is this the checkpoint of another model?"
        )
    row = entry.nbytes // whole
    return replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        offset=entry.offset + start * row,
        nbytes=(stop - start) * row,
    )


def prefix_before(checkpoint: Checkpoint, key: str, known: Iterable[str]) -> str:
    """Return which of the `known` prefixes stands before a key that every such checkpoint has.

    Raises CheckpointError naming the key and what there is.
    """
    for prefix in known:
        if prefix + key in checkpoint:
            return prefix
    raise CheckpointError(
        f"{checkpoint.root}: has no tensor {key!r}, whatever stands before it, but {len(checkpoint)} such as "
        f"{', '.join(checkpoint.names[:3])}; is this the checkpoint of another model?"
    )
