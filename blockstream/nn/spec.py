"""What a module's checkpoint holds: names, dtypes and shapes, and which segment reads which tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.checkpoint.pack import Made

from .conversions import Computed
from .dtypes import FROM_TORCH, parse_dtype
from .prepared import Prepared, read_entry


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


@dataclass(frozen=True)
class Packing:
    """What to pack a module's checkpoint as: the arguments of `blockstream.checkpoint.pack.pack`."""

    segments: dict[str, list[str]]
    float32: frozenset[str]
    made: dict[str, Made]


def packing(module: nn.Module, checkpoint: Checkpoint, dtype: str | None) -> Packing:
    """Return which tensors make up which segment, as streaming cuts the module.

    `float32` are those the module itself keeps so when `dtype` is a shorter one (transformers'
    `_keep_in_fp32_modules`), `made` the parameters that the library computes on loading. Tables that are
    gathered row by row are segments of their own.
    """
    wanted = parse_dtype(dtype)
    prepared = Prepared("model", module, checkpoint, wanted, packing=True)
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
    made = {s.made.path: _made(s.made, s.tensors[0]) for s in sources.values() if s.made is not None}
    return Packing(segments, frozenset(float32), made)


def _made(computed: Computed, stand_in: TensorEntry) -> Made:
    def make() -> memoryview:
        flat = computed.tensor(read_entry).reshape(-1).view(torch.uint8)
        data: memoryview = flat.numpy().data
        return data

    inputs = tuple(t.name for t in computed.inputs)
    return Made(stand_in.dtype, stand_in.shape, inputs, make)
