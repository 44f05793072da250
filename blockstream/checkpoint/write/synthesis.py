"""Write random checkpoints of any size, for benchmarks: in bounded memory, at the disk's speed.

The values are plausible rather than trained: normal, scaled by fan-in, norms near one, so that
activations stay finite. They are cut from one pool of random numbers at a place that depends on seed
and name: the same spec and seed give the same bytes. The folder is marked synthetic, which every
report repeats.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from blockstream.checkpoint.read.catalog import SYNTHESIS_NAME, SYNTHETIC_NAME, Checkpoint
from blockstream.checkpoint.read.convert import can_convert, convert
from blockstream.checkpoint.read.entries import ITEM_NBYTES
from blockstream.checkpoint.read.index import read_json
from blockstream.errors import CheckpointError
from blockstream.system import regular
from blockstream.system.atomic import json_bytes

from .safetensors_writer import TensorSpec, shard, shard_names, usual_order, write_safetensors
from .torch_zip_writer import write_torch_zip
from .writer import UNFINISHED, FileWriter, locked, write_json, write_small

#: Random numbers in the pool: a prime, so that repeats never line up with a matrix's rows.
POOL = 4_194_301
_STEP = 1 << 20


def synthesise(
    spec: Mapping[str, tuple[str, Sequence[int]]],
    dst: str | os.PathLike[str],
    layout: Literal["safetensors", "bin"] = "safetensors",
    shard_nbytes: int | None = None,
    seed: int = 0,
    *,
    note: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> Checkpoint:
    """Write a random checkpoint of `spec`, name -> (dtype, shape), to a new folder; return it opened.

    `layout` is what users have: safetensors, or torch zip files (`.bin`), both as their usual writers
    lay them out and name them, cut into shards of at most `shard_nbytes` with an index. `note` goes
    into the marker, `beside` are small files by their names. Killed and asked the same again, it goes on.
    Raises CheckpointError for a folder that holds weights, a full disk, or a dtype there is no random
    value for; then nothing is left.
    """
    folder = Path(dst)
    unknown = sorted({dtype for dtype, _ in spec.values()} - ITEM_NBYTES.keys())
    if unknown or not spec:
        raise CheckpointError(
            f"{folder}: cannot make {len(spec)} tensors of dtypes {unknown}; "
            f"known are {', '.join(ITEM_NBYTES)}"
        )
    tensors = usual_order(TensorSpec(n, d, tuple(s)) for n, (d, s) in spec.items())
    stem, suffix = ("model", ".safetensors") if layout == "safetensors" else ("pytorch_model", ".bin")
    shards = shard(tensors, shard_nbytes)
    names = [str(name) for name in shard_names(stem, suffix, len(shards))]
    marker: dict[str, Any] = {"seed": seed, **(note or {})}
    whole = [[t.name, t.dtype, list(t.shape)] for t in tensors]
    asked = json.dumps({"marker": marker, "tensors": whole, "files": names})
    about = {**marker, "sha256": hashlib.sha256(asked.encode()).hexdigest()}
    small = {**beside, SYNTHETIC_NAME: json_bytes(marker)}
    written: list[str] = [*names, f"{stem}{suffix}.index.json", *small]
    made = not folder.exists()
    with locked(folder):
        try:
            theirs = _prepare(folder, about, sum(t.nbytes for t in tensors), small)
        except BaseException:
            _leave(folder, (), made)
            raise
        try:
            values = _Values(seed)
            for name, part in zip(names, shards, strict=True):
                if (folder / name).exists():  # whole, as it has its name
                    continue
                with FileWriter(folder / name) as writer:
                    if layout == "safetensors":
                        write_safetensors(writer, part, values, {"format": "pt"})
                    else:
                        write_torch_zip(writer, part, values)
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                    "weight_map": {t.name: n for n, part in zip(names, shards, strict=True) for t in part},
                }
                write_json(folder / f"{stem}{suffix}.index.json", index)
            write_small(folder, {name: data for name, data in small.items() if name not in theirs})
        except BaseException:
            _leave(folder, [*(name for name in written if name not in theirs), SYNTHESIS_NAME], made)
            raise
        (folder / SYNTHESIS_NAME).unlink()
    return Checkpoint.open(folder)


def _prepare(
    folder: Path, about: Mapping[str, Any], nbytes: int, small: Mapping[str, bytes]
) -> frozenset[str]:
    """Note in the folder what is to be written; return which small files are there already, and are the same.

    Raises for a folder that holds weights or other files of those names, and for a disk that is too full.
    """
    journal = folder / SYNTHESIS_NAME
    if journal.exists():
        noted = read_json(journal)
        if not isinstance(noted, dict) or noted.get("about") != about:
            raise CheckpointError(
                f"{folder}: holds unfinished random weights of something else; "
                "remove them or choose another folder"
            )
        return frozenset(name for name in small if name in noted["theirs"])
    held = (".safetensors", ".bin", ".index.json", UNFINISHED)
    own = SYNTHESIS_NAME + UNFINISHED
    there = sorted(p.name for p in folder.iterdir() if p.name.endswith(held) and p.name != own)
    if there:
        raise CheckpointError(
            f"{folder}: holds weights already ({', '.join(there[:3])}); choose another folder"
        )
    theirs = frozenset(name for name in small if (folder / name).exists())
    other = sorted(name for name in theirs if regular.read_bytes(folder / name) != small[name])
    if other:
        raise CheckpointError(f"{folder}: holds another {other[0]} already; choose another folder")
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CheckpointError(
            f"{folder}: {nbytes} bytes are to be written and {free} are free; free some space"
        )
    write_json(journal, {"about": about, "theirs": sorted(theirs)})
    return theirs


def _leave(folder: Path, names: Iterable[str], made: bool) -> None:
    """Remove what was written to a folder, and the folder if it was made for it."""
    with contextlib.suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if made:
            folder.rmdir()


class _Values:
    """Supplies the random bytes of tensors."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # Twice over, so that any stretch up to the pool's length is one slice.
        once = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self._pool = np.concatenate([once, once[:_STEP]])

    def __call__(self, tensor: TensorSpec) -> Iterator[memoryview]:
        """Yield a tensor's bytes."""
        elements = prod(tensor.shape)
        mean, std = _moments(tensor)
        digest = hashlib.sha256(f"{self._seed}:{tensor.name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % POOL
        item = ITEM_NBYTES[tensor.dtype]
        for done in range(0, elements, _STEP):
            n = min(_STEP, elements - done)
            if not can_convert("F32", tensor.dtype) and tensor.dtype != "F64":
                yield memoryview(bytes(n * item))
                continue
            at = (start + done) % POOL
            values = self._pool[at : at + n] * np.float32(std)
            if mean:
                values += np.float32(mean)
            yield _cast(values, tensor.dtype)


def _cast(values: npt.NDArray[np.float32], dtype: str) -> memoryview:
    if dtype == "F64":
        return values.astype(np.float64).data.cast("B")
    src = values.data.cast("B")
    if dtype == "F32":
        return src
    room = memoryview(bytearray(len(src) // 2))
    convert(src, "F32", room, dtype)
    return room


def _moments(tensor: TensorSpec) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor's values, by what its name and shape suggest."""
    name = tensor.name.lower()
    if len(tensor.shape) <= 1:
        if name.endswith("running_var"):
            return 1.0, 0.0
        gain = name.endswith(("weight", "gamma", "scale", "g")) and not name.endswith("bias")
        return (1.0, 0.02) if gain else (0.0, 0.02)
    fan_in = prod(tensor.shape[1:])
    return 0.0, min(fan_in, 1 << 20) ** -0.5 if fan_in else 0.0
