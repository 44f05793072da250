"""A module's weights read another way than streaming reads them, to compare it with.

The bytes come through safetensors' and torch's own readers into ordinary memory, each tensor at a
multiple of 64 and converted by torch. What is shared with streaming is which tensor has which name.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from blockstream.checkpoint import TensorEntry
from blockstream.errors import ModelError
from blockstream.module.dtypes import to_torch
from blockstream.module.narrow import Narrow
from blockstream.module.partition import Place
from blockstream.module.prepared import CPU, Prepared
from blockstream.module.torch_pickle import read_state_dict
from blockstream.module.weights import Weight, read_entry

ALIGN = 64


class Reference:
    """The weights of one prepared module, where compute is. Files are mapped while it is open; close it."""

    def __init__(self, prepared: Prepared, where: torch.device = CPU) -> None:
        self._prepared, self._where = prepared, where
        self._sources = prepared.matched.sources
        self._files = ExitStack()
        self._by_path: dict[Path, Callable[[str], Tensor]] = {}

    def parameter(self, path: str) -> nn.Parameter:
        """Return a parameter, in the dtype it streams in."""
        return self._read(self._prepared.weight(path))

    def item(self, item: Weight) -> Tensor:
        """Return an item of a parameter; nothing but it is read."""
        return self._read(item).view(item.shape)

    def _read(self, weight: Weight) -> nn.Parameter:
        with torch.inference_mode(False), torch.no_grad():
            if weight.spec is not None:
                read = [self._part(r.tensors) for r in weight.requests]
                made: nn.Parameter = Narrow.of(
                    weight.spec,
                    read[0].view(-1).view(torch.uint8).to(self._where),
                    {name: part.to(self._where) for name, part in zip(weight.parts, read[1:], strict=True)},
                )
                made.requires_grad = weight.requires_grad
                return made
            value = _aligned(weight.shape, to_torch(weight.dtype))
            flat, at = value.view(-1), 0
            for entry in weight.tensors:
                stored = self._stored(entry).reshape(-1)
                flat[at : at + stored.numel()].copy_(stored)
                at += stored.numel()
            return nn.Parameter(value.to(self._where), requires_grad=weight.requires_grad)

    def _part(self, entries: Sequence[TensorEntry]) -> Tensor:
        """Return the bytes of a coded weight, or one of its companions, in memory of their own."""
        stored = [self._stored(entry) for entry in entries]
        shape = tuple(stored[0].shape) if len(stored) == 1 else (len(stored), *stored[0].shape)
        value = _aligned(shape, stored[0].dtype)
        for part, one in zip(value.view(len(stored), -1), stored, strict=True):
            part.copy_(one.reshape(-1))
        return value

    def rows(self, path: str, ids: Tensor) -> Tensor:
        """Return rows of a table, as `functional.embedding` does; nothing but them is read."""
        weight = self._prepared.weight(path)
        (entry,) = weight.tensors
        if weight.spec is not None:
            return nn.functional.embedding(ids.to(self._where), self.parameter(path))
        rows = nn.functional.embedding(ids.to(CPU), self._stored(entry))
        return rows.to(to_torch(weight.dtype)).to(self._where)

    def fill_buffers(self) -> None:
        """Write what the files hold for them into the module's stored buffers."""
        for prefix, owner in self._prepared.module.named_modules():
            for name, buffer in owner._buffers.items():
                path = f"{prefix}.{name}" if prefix else name
                if buffer is None or path not in self._sources or name in owner._non_persistent_buffers_set:
                    continue
                (entry,) = self._sources[path].tensors
                with torch.no_grad():
                    buffer.copy_(self._stored(entry))

    def close(self) -> None:
        """Unmap the files."""
        self._by_path.clear()
        self._files.close()

    def _stored(self, entry: TensorEntry) -> Tensor:
        """Return a tensor, or a part of one, as its file holds it: a map where the library maps."""
        if self._prepared.form in ("raw", "gguf") or entry.file.source is not None:  # no library reads them
            return read_entry(entry)
        path = entry.file.path
        if path not in self._by_path:
            entry.file.check()  # a regular file, and the one whose header was read
            self._by_path[path] = self._open(path)
        tensor = self._by_path[path](entry.name)
        if entry.nbytes == tensor.nbytes:
            return tensor
        before = (entry.offset - self._prepared.matched.whole[entry.name].offset) // tensor.itemsize
        return tensor.reshape(-1)[before : before + prod(entry.shape)].view(entry.shape)

    def _open(self, path: Path) -> Callable[[str], Tensor]:
        if zipfile.is_zipfile(path):
            return read_state_dict(path).__getitem__
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ModelError(
                f"{path} is compared with what the safetensors library reads, which is not installed: "
                "pip install safetensors"
            ) from error
        get: Callable[[str], Tensor] = self._files.enter_context(safe_open(path, framework="pt")).get_tensor
        return get


@contextmanager
def bound(module: nn.Module, params: Mapping[tuple[Place, ...], nn.Parameter]) -> Iterator[None]:
    """Have a module use other parameters, each in all its places, for the length of the block."""
    owners = {place: module.get_submodule(place.module) for places in params for place in places}
    before = {place: owner._parameters[place.name] for place, owner in owners.items()}
    try:
        for places, param in params.items():
            for place in places:
                setattr(owners[place], place.name, param)
        yield
    finally:
        for place, owner in owners.items():
            setattr(owner, place.name, before[place])


def nbytes_of(prepared: Prepared) -> int:
    """Return the bytes of all that is read for a module's parameters, in the dtypes they stream in."""
    weights = prepared.weights
    paths = (path for path, _ in prepared.module.named_parameters())
    return sum(weights[path].nbytes for path in paths if path in weights)


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = prod(shape) * dtype.itemsize
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGN
    return raw[start : start + nbytes].view(dtype).view(shape)
