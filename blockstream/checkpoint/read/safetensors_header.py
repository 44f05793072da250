"""Parse the header of one safetensors file, trusting nothing in it. No torch.

Layout (the safetensors specification): 8 bytes n, unsigned little-endian; n bytes of JSON; data.
The JSON maps a tensor's name to {"dtype", "shape", "data_offsets": [begin, end)} relative to the
data, and `__metadata__` to a map of strings.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .entries import ITEM_BITS, ITEM_NBYTES, MOST, FileStamp, TensorEntry, check_extents, unreadable
from .foreign import name_foreign
from .index import unique

#: The specification's own limit; a longer header is an attack or damage.
MOST_HEADER_NBYTES = 100_000_000
_AGAIN = "fetch or write the file again"


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file holds: its stamp, where the data starts, its tensors by name."""

    file: FileStamp
    data_start: int
    entries: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: str | os.PathLike[str], at: int = 0, nbytes: int | None = None) -> Header:
    """Return the validated header of a safetensors file, reading no tensor.

    The file is all of `path`, or the `nbytes` bytes from `at` of it, where it lies inside another.

    Raises CheckpointError for anything the specification forbids; nothing stays open.
    """
    path = Path(path)
    try:
        with regular.opened(path) as stream:
            whole = os.fstat(stream.fileno()).st_size
            file_nbytes = whole if nbytes is None else min(nbytes, whole - at)
            stream.seek(at)
            head = stream.read(64)
            if nbytes is None:
                name_foreign(path, head)
            n = length_of_header(path, head[:8], file_nbytes)
            stream.seek(at + 8)
            text = stream.read(n)
            stamp = FileStamp.take(stream, path, at, 8 + n)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(text) != n:
        raise CheckpointError(f"{path}: the header has {n} bytes, {len(text)} could be read; {_AGAIN}")
    return parse_header(text, stamp, at, at + file_nbytes)


def parse_header(text: bytes, stamp: FileStamp, at: int = 0, end: int | None = None) -> Header:
    """Return the header given its JSON, the file's stamp and where in it the bytes begin and end.

    Raises as `read_header` does.
    """
    path, start = stamp.path, at + 8 + len(text)
    try:
        table = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
        )
    except (ValueError, RecursionError) as error:
        _refuse(path, f"is not a JSON table ({error})")
    if not isinstance(table, dict):
        _refuse(path, f"is a {type(table).__name__}, not a table of tensors")
    metadata = table.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        _refuse(path, "has a __metadata__ that is not a table of strings")
    entries = {name: _entry(name, row, start, stamp) for name, row in table.items()}
    check_extents(path, ((e.name, e.offset, e.end) for e in entries.values()), start, end or stamp.nbytes)
    return Header(stamp, start, entries, metadata)


def length_of_header(path: Path, length: bytes, file_nbytes: int) -> int:
    """Return the header's length given the file's first 8 bytes."""
    if len(length) < 8:
        raise CheckpointError(f"{path}: has {file_nbytes} bytes, a safetensors file has at least 8; {_AGAIN}")
    n = int.from_bytes(length, "little")
    if n > MOST_HEADER_NBYTES:
        raise CheckpointError(
            f"{path}: claims a header of {n} bytes, the format allows {MOST_HEADER_NBYTES}; "
            f"this is no safetensors file, or it is damaged: {_AGAIN}"
        )
    if 8 + n > file_nbytes:
        raise CheckpointError(
            f"{path}: claims a header of {n} bytes in a file of {file_nbytes}; it is truncated: {_AGAIN}"
        )
    return n


def _entry(name: str, row: Any, start: int, stamp: FileStamp) -> TensorEntry:
    """Return one tensor's entry from its row of the header."""
    path = stamp.path
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        _refuse(path, f"describes {name!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in ITEM_NBYTES and dtype not in ITEM_BITS):
        _refuse(
            path, f"gives {name!r} the dtype {dtype!r}; known are {', '.join((*ITEM_NBYTES, *ITEM_BITS))}"
        )
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        _refuse(path, f"gives {name!r} the shape {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        _refuse(path, f"places {name!r} at {_short(offsets)}")
    begin, end = offsets
    bits = ITEM_BITS.get(dtype) or 8 * ITEM_NBYTES[dtype]
    for n in shape:  # stops before a hostile shape grows into a number of megabytes
        bits *= n
        if bits > 8 * MOST:
            _refuse(path, f"gives {name!r} the shape {_short(shape)}: more than 2^63 bytes")
    nbytes = -(-bits // 8)
    if end - begin != nbytes:
        _refuse(
            path,
            f"gives {name!r} {end - begin} bytes, but {dtype} of shape {_short(shape)} is {nbytes}",
        )
    if start + end > MOST:
        _refuse(path, f"places {name!r} at {_short(offsets)}, beyond 2^63")
    return TensorEntry(name, dtype, tuple(shape), stamp, start + begin, nbytes)


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: its header {what}; {_AGAIN}")
