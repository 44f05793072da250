"""Write torch zip files in one pass, without torch: what `torch.save` writes for a state dict.

The pickle is a table of calls of `torch._utils._rebuild_tensor_v2`, each with a storage named by
persistent id; the storages follow as stored members whose bytes begin at multiples of 64, as torch
aligns them. `torch.load(..., weights_only=True)` reads such a file.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import IO

from .safetensors_writer import Bytes, TensorSpec
from .writer import FileWriter

_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_ALIGN = 64
_ZIP64_EXTRA_NBYTES = 20


def write_torch_zip(
    writer: FileWriter, tensors: Sequence[TensorSpec], data: Bytes, root: str = "archive"
) -> None:
    """Write a state dict of the given tensors. KeyError for a dtype torch has no storage class of."""
    with zipfile.ZipFile(writer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", state_dict_pickle(tensors)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            with _member(archive, writer, f"{root}/{name}") as member:
                member.write(content)
        for i, t in enumerate(tensors):
            with _member(archive, writer, f"{root}/data/{i}") as member:
                for piece in data(t):
                    member.write(piece)


@contextmanager
def _member(archive: zipfile.ZipFile, writer: FileWriter, name: str) -> Iterator[IO[bytes]]:
    """Open a stored member whose bytes begin aligned: the header is padded by an extra field."""
    info = zipfile.ZipInfo(name)
    before = 30 + len(name.encode()) + _ZIP64_EXTRA_NBYTES + 4
    pad = -(writer.tell() + before) % _ALIGN
    info.extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
    with archive.open(info, "w", force_zip64=True) as member:
        if writer.tell() % _ALIGN:
            raise AssertionError(f"{name!r} begins at {writer.tell()}, not aligned")
        yield member


def state_dict_pickle(tensors: Sequence[TensorSpec]) -> bytes:
    """Return the pickle (protocol 2) of {name: contiguous tensor on the CPU, storage i}."""
    ops = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for i, t in enumerate(tensors):
        strides = [prod(max(n, 1) for n in t.shape[k + 1 :]) for k in range(len(t.shape))]
        ops += [
            _text(t.name),
            pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n",
            pickle.MARK,
            *(pickle.MARK, _text("storage")),
            pickle.GLOBAL + f"torch\n{_STORAGES[t.dtype]}\n".encode(),
            *(_text(str(i)), _text("cpu"), _whole(prod(t.shape))),
            *(pickle.TUPLE, pickle.BINPERSID),
            *(_whole(0), _tuple(t.shape), _tuple(strides), pickle.NEWFALSE),
            pickle.GLOBAL + b"collections\nOrderedDict\n",
            *(pickle.EMPTY_TUPLE, pickle.REDUCE),
            *(pickle.TUPLE, pickle.REDUCE),
        ]
    return b"".join([*ops, pickle.SETITEMS, pickle.STOP])


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _whole(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _tuple(values: Sequence[int]) -> bytes:
    return b"".join([pickle.MARK, *map(_whole, values), pickle.TUPLE])
