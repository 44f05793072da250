"""What a module's checkpoint holds: names, dtypes and shapes, and which segment reads which tensor."""

from __future__ import annotations

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint

from .dtypes import FROM_TORCH, parse_dtype
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


def pack_segments(
    module: nn.Module, checkpoint: Checkpoint, dtype: str | None
) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Return segment -> names of its tensors, as streaming cuts the module, and the names to hold in float32.

    The latter are what the module itself keeps so when `dtype` is a shorter one (transformers'
    `_keep_in_fp32_modules`). Tables that are gathered row by row are segments of their own.
    """
    wanted = parse_dtype(dtype)
    prepared = Prepared("model", module, checkpoint, wanted)
    sources = prepared.matched.sources
    # "rest" is what pack calls tensors that no segment names.
    paths = {
        "resident" if part.resident else part.name: [places[0].path for places in part.params]
        for part in prepared.parts
    }
    paths |= {f"table.{path}": [path] for path in prepared.tables}
    segments: dict[str, list[str]] = {}
    taken: set[str] = set()
    for segment, members in paths.items():
        names = [entry.name for path in members for entry in sources[path].tensors]
        if fresh := [name for name in dict.fromkeys(names) if name not in taken]:
            segments[segment] = fresh
            taken.update(fresh)
    float32 = {
        entry.name
        for path, _ in module.named_parameters(remove_duplicate=False)
        for entry in sources[path].tensors
        if wanted in ("F16", "BF16") and prepared.dtype_of(path) == torch.float32
    }
    return segments, frozenset(float32)
