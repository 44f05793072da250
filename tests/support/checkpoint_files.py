"""Small checkpoints to test with, and what their tensors must be."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.file_store import FileHandle, FileStore
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.reader import Reader
from blockstream.checkpoint.read.requests import Request, SegmentLayout
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent
from tests.support.fakes import a_load

NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BF16": np.uint16}
NAMES = {np.dtype(v): k for k, v in NUMPY.items() if k != "BF16"}
Arrays = dict[str, npt.NDArray[np.generic]]


def arrays(*shapes: tuple[int, ...], dtype: str = "F32", seed: int = 0) -> Arrays:
    """Return random arrays t0, t1, ... of some shapes."""
    rng = np.random.default_rng(seed)
    return {f"t{i}": (rng.standard_normal(s) * 10).astype(NUMPY[dtype]) for i, s in enumerate(shapes)}


def safetensors_bytes(
    tensors: Mapping[str, npt.NDArray[np.generic]], data_mod_64: int = 0, **rows: object
) -> bytes:
    """Return a file whose data starts at `data_mod_64` mod 64; `rows` replace rows of its header."""
    table: dict[str, object] = {}
    begin = 0
    for name, a in tensors.items():
        place = [begin, begin + a.nbytes]
        table[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": place}
        begin += a.nbytes
    table.update(rows)
    text = json.dumps(table).encode()
    text += b" " * ((data_mod_64 - 8 - len(text)) % 64)
    data = b"".join(a.tobytes() for a in tensors.values())
    return struct.pack("<Q", len(text)) + text + data


def write(path: Path, tensors: Mapping[str, npt.NDArray[np.generic]], data_mod_64: int = 0) -> Path:
    path.write_bytes(safetensors_bytes(tensors, data_mod_64))
    return path


def layout_of(path: Path, **options: int) -> SegmentLayout:
    """Return the layout of one segment that binds every tensor of a checkpoint."""
    checkpoint = Checkpoint.open(path)
    return lay_out("s", [Request(n, (checkpoint[n],)) for n in checkpoint.names], **options)


def store_of(layout: SegmentLayout, **options: object) -> tuple[FileStore, Extent]:
    """Return a store of one stage "m" with one segment, and a room for it."""
    arena = Arena(layout.nbytes + (8 << 10))
    reader = Reader(**options)  # type: ignore[arg-type]
    return FileStore(arena, {"m": {layout.name: layout}}, reader=reader), Extent(4096, layout.nbytes)


def load(store: FileStore, stage: str, segment: str, room: Extent) -> FileHandle:
    """Load a segment, all at once."""
    return store.begin(a_load(stage, segment, room)).finish()


def bound(store: FileStore, handle: FileHandle) -> Arrays:
    """Return copies of a handle's parameters; BF16 as its bits."""
    room = store.arena.view(handle.room)
    return {
        name: np.frombuffer(bytes(room[p.offset : p.offset + p.nbytes]), NUMPY[p.dtype]).reshape(p.shape)
        for name, p in handle.layout.tensors.items()
    }


def cached_pages(path: Path) -> int:
    """Return how many pages of a file are in the page cache."""
    nbytes = path.stat().st_size
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), nbytes, flags=mmap.MAP_PRIVATE)
    pages = -(-nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    first = ctypes.c_char.from_buffer(mapped)
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.mincore(
        ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), ctypes.byref(found)
    )
    assert code == 0, os.strerror(ctypes.get_errno())
    del first
    mapped.close()
    return sum(b & 1 for b in found)


def drop_cache(path: Path) -> None:
    """Drop a file's pages from the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
