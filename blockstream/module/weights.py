"""What each parameter is read as: its numbers, or the bytes and companions of a coded weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from blockstream.checkpoint import TensorEntry
from blockstream.checkpoint.read.entries import ITEM_NBYTES
from blockstream.checkpoint.read.reader import ReadFile, pread
from blockstream.checkpoint.read.requests import Request
from blockstream.errors import CheckpointError

from .conversions import Source
from .dtypes import COMPUTED, FLOATING, FROM_TORCH, to_torch
from .narrow import Narrow, Spec


@dataclass(frozen=True)
class Weight:
    """One parameter: what is read for it, and the dtype and shape it has for whoever uses it.

    `requests` is one, or the bytes and companions of a coded weight, of which `spec` says the rest; `tensors`
    are those of the source. `requires_grad` is that of the module's own: torch folds a product by it, and
    another fold rounds otherwise.
    """

    path: str
    requests: tuple[Request, ...]
    tensors: tuple[TensorEntry, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: Spec | None = None
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        """Return the bytes it takes in memory while it is loaded."""
        return sum(prod(r.shape or ()) * ITEM_NBYTES[r.dtype or r.tensors[0].dtype] for r in self.requests)

    def empty(self) -> nn.Parameter:
        """Return a parameter like this one, of whatever lies where it is made."""
        if self.spec is None:
            data = torch.empty(self.shape, dtype=to_torch(self.dtype), device="cpu")
            return nn.Parameter(data, requires_grad=self.requires_grad)
        raw, *beside = (
            torch.empty(r.shape or (), dtype=to_torch(r.tensors[0].dtype), device="cpu")
            for r in self.requests
        )
        made: nn.Parameter = Narrow.of(self.spec, raw, dict(zip(self.parts, beside, strict=True)))
        made.requires_grad = self.requires_grad
        return made

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts that its companions have in it, in the order of the requests for them."""
        return parts_of(self.path, [r.param for r in self.requests])


def parts_of(path: str, names: list[str]) -> tuple[str, ...]:
    """Return the parts of a coded weight's companions, told from the names of all its requests."""
    return tuple(name.removeprefix(f"{path}:") for name in names if name != path)


def weight_of(path: str, param: Tensor, source: Source, dtype: str | None) -> Weight:
    """Return how one parameter is read; only floating tensors take another dtype.

    Where none is named, what torch does not compute in is brought to the module's own.
    """
    if any(t.coded is not None for t in source.tensors):
        return _coded(path, param, source, dtype)
    if dtype is None and source.dtype not in COMPUTED:
        dtype = FROM_TORCH.get(param.dtype)
    converted = dtype if dtype is not None and source.dtype in FLOATING else None
    request = Request(path, source.tensors, converted, tuple(param.shape))
    kept = converted or source.dtype
    trained = param.requires_grad and to_torch(kept).is_floating_point
    return Weight(path, (request,), source.tensors, tuple(param.shape), kept, requires_grad=trained)


def _coded(path: str, param: Tensor, source: Source, dtype: str | None) -> Weight:
    """Return how a coded weight is read: its bytes as they are, its companions beside them."""
    first, count, shape = source.tensors[0], len(source.tensors), tuple(param.shape)
    alike = {(t.dtype, t.shape, None if t.coded is None else repr(t.coded.about)) for t in source.tensors}
    if len(alike) > 1 or first.coded is None:
        kinds = ", ".join(sorted({f"{t.dtype} {list(t.shape)}" for t in source.tensors}))
        raise CheckpointError(
            f"{first.file.path}: parameter {path!r} is made of tensors coded in different ways ({kinds}); "
            "write the checkpoint dequantised with the library that quantised it"
        )
    if count * prod(first.shape) != prod(shape) or (count == 1 and first.shape != shape):
        raise CheckpointError(
            f"{first.file.path}: {first.name!r} is {first.dtype} of shape {list(first.shape)} and parameter "
            f"{path!r} has {list(shape)}; is this the checkpoint of another model?"
        )
    own = dtype or FROM_TORCH[param.dtype]
    raw = tuple(_bytes(t) for t in source.tensors)
    requests = [Request(path, raw, None, (sum(t.nbytes for t in raw),))]
    for part, beside in first.coded.beside.items():
        each = tuple(t.coded.beside[part] for t in source.tensors if t.coded is not None)
        wanted = beside.shape if count == 1 else (count, *beside.shape)
        requests.append(Request(f"{path}:{part}", each, None, wanted))
    row = first.coded.row
    assert row is not None, "a coded weight has a row of the table"
    spec = Spec(
        row.name,
        row.widen(),
        shape,
        to_torch(own),
        first.coded.about,
        row.by_row,
        count,
        first.shape,
    )
    return Weight(path, tuple(requests), source.tensors, shape, own, spec, param.requires_grad)


def _bytes(entry: TensorEntry) -> TensorEntry:
    """Return a coded weight's own bytes as an entry."""
    assert entry.coded is not None
    return TensorEntry(entry.coded.stored, "U8", (entry.nbytes,), entry.file, entry.offset, entry.nbytes)


def item_of(weight: Weight, i: int) -> Weight | None:
    """Return one item of a weight along its first dimension, read alone; None where that cannot be."""
    n, spec = weight.shape[0], weight.spec
    many = len(weight.tensors) > 1
    if len(weight.tensors) % n if many else spec is not None and not spec.by_row:
        return None
    per = len(weight.tensors) // n if many else 0
    requests = []
    for r in weight.requests:
        shape = r.tensors[0].shape if r.shape is None else r.shape
        if many:
            tensors = r.tensors[i * per : (i + 1) * per]
            shape = tensors[0].shape if spec is not None and per == 1 else (per, *tensors[0].shape)
        else:
            whole = r.tensors[0]
            rows = whole.shape[:1] == (n,) or (r.param == weight.path and spec is not None)
            if not rows or whole.nbytes % n:
                return None
            nbytes = whole.nbytes // n
            shape = (nbytes,) if len(whole.shape) == 1 else whole.shape[1:]
            tensors = (replace(whole, shape=shape, offset=whole.offset + i * nbytes, nbytes=nbytes),)
        if spec is None:
            shape = weight.shape[1:]
        elif r.param == weight.path:
            shape = (sum(t.nbytes for t in tensors),)
        requests.append(replace(r, tensors=tensors, shape=shape))
    item = weight.shape[1:]
    if spec is not None:
        spec = (
            replace(spec, shape=(1, *item))
            if not many
            else replace(spec, shape=spec.part_shape if per == 1 else (1, *item), count=per)
        )
    return replace(weight, requests=tuple(requests), tensors=requests[0].tensors, shape=item, spec=spec)


def read_buffer(path: str, source: Source, shape: tuple[int, ...]) -> Tensor:
    """Return a small tensor read from its file."""
    if len(source.tensors) != 1 or source.tensors[0].shape != shape:
        entry = source.tensors[0]
        raise CheckpointError(
            f"{entry.file.path}: {entry.name!r} has shape {list(entry.shape)} and buffer {path!r} has "
            f"{list(shape)}; is this the checkpoint of another model?"
        )
    return read_entry(source.tensors[0])


def read_entry(entry: TensorEntry) -> Tensor:
    """Return one tensor of a checkpoint, read through the page cache, or from wherever its file lies."""
    entry.file.check()
    tensor = torch.empty(entry.shape, dtype=to_torch(entry.dtype))
    if not entry.nbytes:
        return tensor
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    if entry.file.source is not None:
        entry.file.source.read(entry.file, entry.offset, room)
        return tensor
    file = ReadFile(entry.file.path, direct=False)
    try:
        done = 0
        while done < entry.nbytes:
            n = pread(file.descriptor, room[done:], entry.offset + done)
            if n == 0:
                raise CheckpointError(f"{entry.file.path}: ends inside {entry.name!r}; fetch it again")
            done += n
    finally:
        file.close()
    return tensor
