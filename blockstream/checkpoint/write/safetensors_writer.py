"""Write safetensors files in one pass: the header is known before the first byte of data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from blockstream.checkpoint.read.entries import ITEM_NBYTES, tensor_nbytes

from .writer import FileWriter


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the tensor's bytes."""
        return tensor_nbytes(self.dtype, self.shape)


class Bytes(Protocol):
    """Supplies the bytes of tensors, in pieces."""

    def __call__(self, tensor: TensorSpec) -> Iterable[bytes | memoryview]:
        """Yield the bytes of a tensor in order; each piece is used before the next is asked for."""


def usual_order(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return tensors in the order safetensors' own writers use: widest elements first, then names."""
    return sorted(tensors, key=lambda t: (-ITEM_NBYTES[t.dtype], t.name))


def aligned_order(tensors: Iterable[TensorSpec], align: int = 64) -> list[TensorSpec]:
    """Return tensors so that, from an aligned start, all but odd-sized ones begin aligned.

    The format has no room between tensors, so those of odd sizes come last, the widest elements
    and the largest tensors first.
    """
    tensors = list(tensors)
    even = [t for t in tensors if t.nbytes % align == 0]
    odd = [t for t in tensors if t.nbytes % align]
    return even + sorted(odd, key=lambda t: (-ITEM_NBYTES[t.dtype], -t.nbytes))


def header_bytes(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, align: int = 8
) -> bytes:
    """Return length and JSON, padded with spaces so that the data begins at a multiple of `align`."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for t in tensors:
        end = begin + t.nbytes
        table[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    writer: FileWriter,
    tensors: Sequence[TensorSpec],
    data: Bytes,
    metadata: Mapping[str, str] | None = None,
    align: int = 8,
) -> bytes:
    """Write a whole file in the order given; return its header's bytes."""
    header = header_bytes(tensors, metadata, align)
    writer.write(header)
    for t in tensors:
        before = writer.tell()
        for piece in data(t):
            writer.write(piece)
        if writer.tell() - before != t.nbytes:
            raise ValueError(f"{t.name!r} got {writer.tell() - before} bytes, not {t.nbytes}")
    return header


def shard(tensors: Iterable[TensorSpec], most_nbytes: int | None) -> list[list[TensorSpec]]:
    """Return the tensors cut into shards of at most `most_nbytes` (one larger tensor: its own)."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for t in tensors:
        if most_nbytes is not None and shards[-1] and held + t.nbytes > most_nbytes:
            shards.append([])
            held = 0
        shards[-1].append(t)
        held += t.nbytes
    return shards


def shard_names(stem: str, suffix: str, n: int) -> list[Path]:
    """Return the usual names: `stem.suffix`, or `stem-00001-of-0000n.suffix` for several."""
    if n == 1:
        return [Path(f"{stem}{suffix}")]
    return [Path(f"{stem}-{i:05}-of-{n:05}{suffix}") for i in range(1, n + 1)]
