"""What a run goes on from, as one file: tensors, numbers and None in mappings and lists, with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular


def packed(tree: Mapping[str, Any], name: str, path: Path) -> None:
    """Write a tree to a file. Raises ConfigError naming what is neither tensor, number nor None."""
    tensors: dict[str, Tensor] = {}
    state = json.dumps(_pack(tree, "", tensors))
    save_file(tensors, path, {"state": state, "sha256": _digest(name, state, tensors)})


def unpacked(path: Path, name: str, finite: bool = True) -> dict[str, Any]:
    """Return the tree in a file.

    Raises CheckpointError, naming the file, when it is damaged, another state's, or, where it has to be
    `finite`, holds a tensor that is not.
    """
    try:
        regular.check(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            # Memory of its own, aligned as that of a computed tensor: kernels differ with the address.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        sound = about["sha256"] == _digest(name, about["state"], tensors)
        tree = _unpack(json.loads(about["state"]), tensors) if sound else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: its checksum is another")
    for key, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key.lstrip('.')} holds numbers that are not finite")
    return tree


def unsaved(tree: Any, where: str) -> str | None:
    """Return what of a tree cannot be saved, in words; None where all can."""
    try:
        _pack(tree, where, None)
    except ConfigError as error:
        return str(error)
    return None


def _digest(name: str, state: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{name}\n{state}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    """Return a value as JSON holds it; its tensors are put aside by the path they lie at.

    A tensor keeps its order in memory, on which a kernel, and so a bit, may depend.
    """
    if isinstance(value, Tensor):
        strides = value.stride()
        axes = sorted(range(value.dim()), key=lambda i: -strides[i])
        if tensors is not None:
            plain = value.detach().cpu().permute(axes)
            tensors[where] = plain.clone(memory_format=torch.contiguous_format)
        return {"tensor": where, "axes": axes}
    if isinstance(value, Mapping):
        if wrong := [k for k in value if not isinstance(k, str)]:
            raise ConfigError(
                f"{where.lstrip('.')} has the key {wrong[0]!r}; names of what is saved are text"
            )
        return {"map": {k: _pack(v, f"{where}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, f"{where}.{k}", tensors) for k, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(
        f"{where.lstrip('.')} is {type(value).__name__}; what is to be saved must be tensors and numbers"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `_pack` made JSON of."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        axes = value["axes"]
        return tensors[value["tensor"]].permute([axes.index(i) for i in range(len(axes))])
    if "map" in value:
        return {key: _unpack(item, tensors) for key, item in value["map"].items()}
    return [_unpack(item, tensors) for item in value["list"]]
