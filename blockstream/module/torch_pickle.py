"""List the tensors of a torch zip file by reading its pickle on meta, weights only.

torch builds every tensor without its bytes and notes where each storage lies; the zip directory
(`blockstream.checkpoint.read.torch_zip`) says the same independently, and both must agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockstream.checkpoint.read.entries import TensorEntry
from blockstream.checkpoint.read.torch_zip import TorchZip, read_records
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .dtypes import FROM_TORCH

#: Keys under which training scripts put the weights among other things, those that are taken first first.
_WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "params_ema", "params", "net", "network",
    "generator", "model_ema", "ema", "weights",
)  # fmt: skip
#: What a torch file may hold beside tensors: scalars as numpy wrote them, which are numbers and no code.
_NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(c)) for c in "?bBhHiIlLqQefd"},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_UNSUPPORTED = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)")
#: A file whose views lie over each other so many times is an attack, or was saved from views by mistake.
MOST_VIEWS = 8


def read_entries(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the tensors of a torch zip file by name; no tensor's bytes are read.

    A state dict may be wrapped (`state_dict`, `model`, ..., once or twice) beside other things; values that
    are no tensors are left out. Tensors that share a storage share its bytes. Raises CheckpointError naming
    the tensor for one that is not contiguous, strided and dense.
    """
    path = Path(path)
    archive = read_records(path)
    tensors = _tensors(path, _load_on_meta(path))
    storages = archive.storages
    entries = {name: _entry(name, t, archive, storages) for name, t in tensors.items()}
    distinct = {(e.offset, e.nbytes) for e in entries.values()}
    if sum(nbytes for _, nbytes in distinct) > MOST_VIEWS * max(archive.file.nbytes, 1):
        raise CheckpointError(
            f"{path}: its {len(entries)} tensors are overlapping views of {archive.file.nbytes} bytes, "
            f"{sum(n for _, n in distinct)} bytes in all; save each with .clone()"
        )
    return entries


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a torch zip file by name, mapped: no bytes are read until they are used."""
    regular.check(path)
    with torch.serialization.safe_globals(_NUMBERS):
        return _tensors(path, torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def _load_on_meta(path: Path) -> Any:
    """Return what the file holds, tensors on meta."""
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            if notes_offsets_on_meta():
                return torch.load(path, map_location="meta", weights_only=True)
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():
                return torch.load(path, weights_only=True)
    except Exception as error:  # a hostile pickle can make torch raise anything
        raise CheckpointError(
            f"{path}: torch refuses to read it as weights only ({_reason(error)}); "
            "save the state dict alone, or as safetensors"
        ) from error


def notes_offsets_on_meta() -> bool:
    """Return whether this torch loads on meta without reading; older ones do for fake tensors only."""
    return hasattr(torch.serialization, "_is_meta_location")


def _reason(error: Exception) -> str:
    """Return why torch refused a file: the class it names, else the first line of what it says."""
    text = _TERMINAL.sub("", str(error)).strip()
    if (found := _UNSUPPORTED.search(text)) is not None:
        return f"it holds an object of {found[1].rstrip('.')}, and unpickling that could run code"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _tensors(path: Path, value: Any) -> dict[str, torch.Tensor]:
    """Return the state dict a file holds, unwrapped."""
    found = _unwrapped(value)
    if found:
        return found
    kind = type(value).__name__
    what = f"keys {list(value)[:4]}" if isinstance(value, Mapping) else "no table"
    raise CheckpointError(
        f"{path}: holds a {kind} ({what}) and no table of names and tensors; save the state dict"
    )


def _unwrapped(value: Any, depth: int = 3) -> dict[str, torch.Tensor]:
    """Return the table of names and tensors in a value: under a wrapper's key, its own, or the one below."""
    if not isinstance(value, Mapping) or not depth:
        return {}
    for key in _WRAPPERS:
        if found := _unwrapped(value.get(key), depth - 1):
            return found
    if own := {k: t for k, t in value.items() if isinstance(t, torch.Tensor)}:
        return own if all(isinstance(k, str) for k in own) else {}
    below = [found for x in value.values() if (found := _unwrapped(x, depth - 1))]
    return below[0] if len(below) == 1 else {}


def _entry(name: str, tensor: torch.Tensor, archive: TorchZip, storages: Mapping[int, int]) -> TensorEntry:
    """Return where one tensor lies, its storage found in the archive's directory."""
    path = archive.file.path
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or not tensor.is_contiguous()
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.dtype not in FROM_TORCH
    ):
        raise CheckpointError(
            f"{path}: {name!r} ({tensor.dtype}, {tensor.layout}, shape {list(tensor.shape)}) is not "
            "a plain contiguous tensor; save it with .contiguous()"
        )
    storage = tensor.untyped_storage()
    nbytes = tensor.numel() * tensor.itemsize
    if nbytes == 0:
        shape = tuple(tensor.shape)
        return TensorEntry(name, FROM_TORCH[tensor.dtype], shape, archive.file, 0, 0)
    start = getattr(storage, "_checkpoint_offset", None)
    begin = int(tensor.storage_offset()) * tensor.itemsize
    if not isinstance(start, int) or begin + nbytes > storages.get(start, -1):
        raise CheckpointError(
            f"{path}: {name!r} takes {nbytes} bytes from {begin} of a storage at {start}, which the "
            "zip directory does not have; the file is damaged: fetch it again"
        )
    dtype, shape = FROM_TORCH[tensor.dtype], tuple(tensor.shape)
    return TensorEntry(name, dtype, shape, archive.file, start + begin, nbytes)
