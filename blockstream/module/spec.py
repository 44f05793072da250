"""What a module's checkpoint holds: names, dtypes and shapes, and which segment reads which tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.checkpoint.write.packer import Made
from blockstream.checkpoint.write.rounding import FLOATS
from blockstream.errors import CheckpointError, ModelError
from blockstream.module.layers.int8 import roundable

from .conversions import Computed
from .dtypes import FROM_TORCH, parse_dtype
from .prepared import Prepared
from .weights import read_entry


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
    """What to pack a module's checkpoint as: the arguments of `blockstream.checkpoint.write.packer.pack`."""

    segments: dict[str, list[str]]
    float32: frozenset[str]
    int8: frozenset[str]
    made: dict[str, Made]


def packing(module: nn.Module, checkpoint: Checkpoint, dtype: str | None) -> Packing:
    """Return which tensors make up which segment, as streaming cuts the module.

    `float32` are those the module itself keeps so when `dtype` is a shorter one (transformers'
    `_keep_in_fp32_modules`), `int8` the weights of the blocks' linear layers when `dtype` is that, `made`
    the parameters that the library computes on loading. Tables that are gathered row by row are segments
    of their own. Raises ModelError where there is nothing for int8.
    """
    wanted = None if dtype == "int8" else parse_dtype(dtype)
    prepared = Prepared("model", module, checkpoint, wanted, packing=True)
    sources = prepared.matched.sources
    coded = next((e for s in sources.values() for e in s.tensors if e.coded is not None), None)
    if coded is not None and checkpoint.form == "gguf":
        raise CheckpointError(
            f"{checkpoint.root}: is GGUF, whose blocks no safetensors file holds; it streams as it lies"
        )
    if coded is not None and dtype is not None:
        raise CheckpointError(
            f"{checkpoint.root}: {coded.name!r} is in format {coded.dtype}, whose bytes a pack keeps as they "
            f"are; leave --dtype {dtype} out, or pack the original checkpoint"
        )
    # "rest" is what pack calls tensors that no segment names.
    paths = {
        "resident" if part.resident else part.name: [places[0].path for places in part.params]
        for part in prepared.parts
    }
    paths |= {f"table.{path}": [path] for path in prepared.tables}
    segments: dict[str, list[str]] = {}
    taken: set[str] = set()
    for segment, members in paths.items():
        names = [n for path in members for entry in sources[path].tensors for n in _held(entry, checkpoint)]
        if fresh := [name for name in dict.fromkeys(names) if name not in taken]:
            segments[segment] = fresh
            taken.update(fresh)
    float32 = {
        entry.name
        for path, _ in module.named_parameters(remove_duplicate=False)
        if path in sources
        for entry in sources[path].tensors
        if wanted in ("F16", "BF16") and prepared.dtype_of(path) == torch.float32
    }
    made = {s.made.path: _made(s.made, s.tensors[0]) for s in sources.values() if s.made is not None}
    int8 = _int8(prepared, checkpoint) if dtype == "int8" else frozenset[str]()
    return Packing(segments, frozenset(float32), int8, made)


def _held(entry: TensorEntry, checkpoint: Checkpoint) -> list[str]:
    """Return the tensors that hold an entry: a coded one's own bytes, and those beside it."""
    if entry.coded is None:
        return [entry.name]
    beside = (one.name for one in entry.coded.beside.values())
    names = (entry.coded.stored, *beside, *entry.coded.dropped)
    return [name for name in names if name in checkpoint]


def _int8(prepared: Prepared, checkpoint: Checkpoint) -> frozenset[str]:
    """Return the tensors to round: what stays for the whole stage (first and last layers) keeps its dtype."""
    streamed = {x.path for part in prepared.parts if not part.resident for at in part.params for x in at}
    bytes_of: Counter[tuple[object, int]] = Counter((e.file, e.offset) for e in checkpoint.entries.values())
    found = set()
    for path in roundable(prepared.module, streamed):
        source = prepared.matched.sources[path]
        entry = source.tensors[0]
        whole = source.made is None and source.tensors == (checkpoint.entries.get(entry.name),)
        if whole and entry.dtype in FLOATS and entry.nbytes and bytes_of[entry.file, entry.offset] == 1:
            found.add(entry.name)
    if not found:
        raise ModelError(
            f"{type(prepared.module).__name__} has no linear layers in its blocks that could be int8; pack "
            "it in bf16"
        )
    return frozenset(found)


def _made(computed: Computed, stand_in: TensorEntry) -> Made:
    def make() -> memoryview:
        flat = computed.tensor(read_entry).reshape(-1).view(torch.uint8)
        data: memoryview = flat.numpy().data
        return data

    inputs = tuple(t.name for t in computed.inputs)
    return Made(stand_in.dtype, stand_in.shape, inputs, make)
