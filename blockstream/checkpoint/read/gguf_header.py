"""Read the header of a GGUF file with the `gguf` package: its tensors, their formats, its architecture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from blockstream.checkpoint.formats import TABLE, by_name
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .entries import Coded, FileStamp, TensorEntry, check_extents

MAGIC = b"GGUF"
#: GGUF's names of plain numbers, as safetensors writes them.
_PLAIN = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16", "I8": "I8", "I16": "I16", "I32": "I32",
          "I64": "I64"}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file holds: tensors by the file's own names, and the architecture they are named for."""

    entries: dict[str, TensorEntry]
    architecture: str


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file; its tensors are not read.

    Raises CheckpointError without the `gguf` package, and for a file that is not what it says.
    """
    regular.check(path)
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: is a GGUF file, whose header the package gguf reads, and that is not installed: "
            "pip install 'blockstream-engine[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise CheckpointError(f"{path}: its numbers are of another byte order than this machine's")
        field = reader.get_field("general.architecture")
        architecture = "" if field is None else str(field.contents())
        found = [(str(t.name), t.tensor_type.name, t.shape.tolist()[::-1], int(t.data_offset), int(t.n_bytes))
                 for t in reader.tensors]  # fmt: skip
        start = int(reader.data_offset)
        del reader
    except CheckpointError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path}: its GGUF header cannot be read ({first}); the file is truncated or "
            "damaged: fetch it again"
        ) from error
    with regular.opened(path) as stream:
        stamp = FileStamp.take(stream, path, 0, start)
    check_extents(path, ((name, at, at + nbytes) for name, _, _, at, nbytes in found), start, stamp.nbytes)
    if not found:
        raise CheckpointError(f"{path}: is a GGUF file that holds no tensors; fetch it again")
    rows = by_name(TABLE)
    entries = {}
    for name, kind, shape, at, nbytes in found:
        coded = Coded(name, row=rows[kind]) if kind in rows else None
        dtype = _PLAIN.get(kind, kind)
        entries[name] = TensorEntry(name, dtype, tuple(shape), stamp, at, nbytes, coded)
    return GgufHeader(entries, architecture)
