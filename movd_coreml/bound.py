"""The weights of one network, of which some modules' at a time are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.rounding import SCALE
from blockstream.module.partition import Place
from blockstream.module.prepared import Prepared, read_entry
from blockstream.verify.reference import Reference, bound


class Bound:
    """A module without weights and the checkpoint that holds them. Close it: files stay mapped until then."""

    def __init__(self, name: str, module: Any, checkpoint: Checkpoint) -> None:
        self.module, self._checkpoint = module, checkpoint
        self._prepared = Prepared(name, module, checkpoint, "F32")
        self._reference = Reference(self._prepared)
        self._reference.fill_buffers()

    @contextmanager
    def weights(
        self, modules: Sequence[str], change: Callable[[str, Tensor], Tensor] | None = None
    ) -> Iterator[None]:
        """Hold the weights under `modules` in float32 for the length of the block.

        `change(path, weight)` may put others in their place.
        """
        params = {}
        for path, _ in self.module.named_parameters(remove_duplicate=False):
            if path.startswith(tuple(f"{m}." for m in modules)) or path in modules:
                value = self.parameter(path)
                if change is not None:
                    value = change(path, value)
                params[(_place(path),)] = nn.Parameter(value, requires_grad=False)
        with bound(self.module, params):
            yield

    def parameter(self, path: str) -> Tensor:
        """Return one parameter in float32; what is packed as int8, times its scales."""
        value = self._reference.parameter(path).data
        if value.dtype != torch.int8:
            return value
        (entry,) = self._prepared.matched.sources[path].tensors
        return value * read_entry(self._checkpoint[entry.name + SCALE])[:, None]

    def nbytes(self, modules: Sequence[str]) -> int:
        """Return the bytes of the weights under `modules` in float32."""
        return sum(4 * p.numel() for m in modules for p in self.module.get_submodule(m).parameters())

    def close(self) -> None:
        """Unmap the files."""
        self._reference.close()


def _place(path: str) -> Place:
    module, _, name = path.rpartition(".")
    return Place(module, name)
