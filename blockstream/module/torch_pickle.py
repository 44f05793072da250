"""List the tensors of a torch zip file by reading its pickle on meta, weights only.

torch builds every tensor without its bytes and notes where each storage lies; the zip directory
(`blockstream.checkpoint.read.torch_zip`) says the same independently, and both must agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockstream.checkpoint.read.entries import TensorEntry
from blockstream.checkpoint.read.torch_zip import TorchZip, read_records
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .dtypes import FROM_TORCH

#: Keys under which training scripts put the weights among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_entries(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the tensors of a torch zip file by name; no tensor's bytes are read.

    A state dict may be wrapped once (`state_dict`, `model`, ...); values that are no tensors are
    left out. Tensors that share a storage share its bytes. Raises CheckpointError naming the tensor
    for one that is not contiguous, strided and dense.
    """
    path = Path(path)
    archive = read_records(path)
    tensors = _tensors(path, _load_on_meta(path))
    storages = archive.storages
    return {name: _entry(name, t, archive, storages) for name, t in tensors.items()}


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a torch zip file by name, mapped: no bytes are read until they are used."""
    regular.check(path)
    return _tensors(path, torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def _load_on_meta(path: Path) -> Any:
    """Return what the file holds, tensors on meta."""
    try:
        if _notes_offsets_on_meta():
            return torch.load(path, map_location="meta", weights_only=True)
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.load(path, weights_only=True)
    except Exception as error:  # a hostile pickle can make torch raise anything
        raise CheckpointError(
            f"{path}: torch refuses to read it as weights only ({_first_line(error)}); "
            "save the state dict alone, or as safetensors"
        ) from error


def _notes_offsets_on_meta() -> bool:
    """Return whether this torch loads on meta without reading; older ones do for fake tensors only."""
    return hasattr(torch.serialization, "_is_meta_location")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _tensors(path: Path, value: Any) -> dict[str, torch.Tensor]:
    """Return the state dict a file holds, unwrapped."""
    for candidate in (value, *(value.get(k) for k in _WRAPPERS if isinstance(value, Mapping))):
        if isinstance(candidate, Mapping):
            found = {k: t for k, t in candidate.items() if isinstance(t, torch.Tensor)}
            if found and all(isinstance(k, str) for k in found):
                return found
    kind = type(value).__name__
    what = f"keys {list(value)[:4]}" if isinstance(value, Mapping) else "no table"
    raise CheckpointError(
        f"{path}: holds a {kind} ({what}) and no table of names and tensors; save the state dict"
    )


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
