"""What a module's checkpoint holds: names, dtypes and shapes, and which segment reads which tensor."""

from __future__ import annotations

from torch import nn

from blockstream.checkpoint import Checkpoint

from .dtypes import FROM_TORCH
from .prepared import Prepared


def tensor_spec(module: nn.Module, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (dtype, shape) of every tensor a checkpoint of the module has.

    Floating-point tensors take `dtype` ("F32", "BF16", "F16"); of tied ones the first name is kept.
    """
    spec: dict[str, tuple[str, tuple[int, ...]]] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kept = dtype if tensor.is_floating_point() else FROM_TORCH[tensor.dtype]
        spec[name] = (kept, tuple(tensor.shape))
    return spec


def segment_tensors(module: nn.Module, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return segment -> the names of its tensors in the checkpoint, as streaming would cut the module."""
    prepared = Prepared("model", module, checkpoint, None)
    return {
        part.name: [
            entry.name for places in part.params for entry in prepared.matched.sources[places[0].path].tensors
        ]
        for part in prepared.parts
    }
