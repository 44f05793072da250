"""A weight in memory as it lies on disk: what uses it gets it widened, for that operation alone.

To whatever asks, it is a parameter of the weight's shape and dtype. Its bytes and companions are views of the
segment's extent; nothing of it outlives the operation that used it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from blockstream.errors import ModelError

_aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """What a layer widens: `raw` uint8 [n], the tensors `beside` it, the weight's `shape` and `dtype`.

    `about` is what the format's `find` said of this weight.
    """

    raw: Tensor
    beside: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    about: Mapping[str, Any] = field(default_factory=dict)

    def cut(self, begin: int, end: int) -> Stored:
        """Return some items along the first dimension, of a format whose items have bytes of their own."""

        def part(x: Tensor) -> Tensor:
            return x.view(self.shape[0], -1)[begin:end] if x.numel() else x

        shape = (end - begin, *self.shape[1:])
        beside = {k: part(x) for k, x in self.beside.items()}
        return replace(self, raw=part(self.raw).reshape(-1), beside=beside, shape=shape)


@dataclass(frozen=True)
class Spec:
    """What is known of a narrow weight beside its bytes.

    It is made of `count` equal parts, one after another, each widened by `widen`.
    """

    format: str
    widen: Callable[[Stored], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    about: Mapping[str, Any] = field(default_factory=dict)
    by_row: bool = False
    count: int = 1
    part_shape: tuple[int, ...] = ()

    def wide(self, stored: Stored) -> Tensor:
        """Return what is stored as numbers; raises ModelError for a layer that makes something else."""
        made = self.widen(stored)
        if tuple(made.shape) != stored.shape or made.dtype != stored.dtype:
            raise ModelError(
                f"format {self.format!r}: its layer made {made.dtype} {list(made.shape)} and {stored.dtype} "
                f"{list(stored.shape)} is needed"
            )
        return made


class Narrow(nn.Parameter):
    """A parameter whose bytes are those of the file; see this file's first lines."""

    spec: Spec
    stored: Stored

    @classmethod
    def of(cls, spec: Spec, raw: Tensor, beside: Mapping[str, Tensor]) -> Any:
        """Return the weight of some bytes, uint8 [n], and its companions."""
        with torch.inference_mode(False):
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls, spec.shape, dtype=spec.dtype, device=raw.device, requires_grad=False
            )
        made.spec = spec
        made.stored = Stored(raw, beside, spec.shape, spec.dtype, spec.about)
        return made

    #: Whoever asks whether functions are overridden is told no, as of any parameter.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def wide(self) -> Tensor:
        """Return the weight as numbers, in memory of its own."""
        spec = self.spec
        if spec.count == 1:
            return spec.wide(self.stored)
        made = torch.empty(spec.shape, dtype=spec.dtype, device=self.stored.raw.device)
        flat = made.view(spec.count, -1)
        for i in range(spec.count):
            flat[i] = self._part(i).reshape(-1)
        return made

    def _part(self, i: int) -> Tensor:
        """Return one of several parts as numbers."""
        spec = self.spec
        whole = replace(self.stored, shape=(spec.count, *spec.part_shape))
        return spec.wide(replace(whole.cut(i, i + 1), shape=spec.part_shape))

    def _items(self, begin: int, end: int) -> Tensor | None:
        """Return items along the first dimension as numbers; None where they cannot be had alone."""
        spec, n = self.spec, self.spec.shape[0]
        if spec.count == 1 and spec.by_row:
            return spec.wide(self.stored.cut(begin, end))
        if spec.count % n == 0 and spec.count > 1:
            per = spec.count // n
            parts = [self._part(i) for i in range(begin * per, end * per)]
            return torch.stack(parts).view(end - begin, *spec.shape[1:])
        return None

    def _rows(self, ids: Tensor) -> Tensor | None:
        """Return rows of a table, [*ids.shape, columns]; None where they cannot be had alone."""
        spec = self.spec
        if not (spec.by_row and spec.count == 1 and len(spec.shape) == 2):
            return None
        rows = spec.shape[0]

        def some(x: Tensor) -> Tensor:
            return x.view(rows, -1)[ids.reshape(-1)] if x.numel() else x

        beside = {k: some(x) for k, x in self.stored.beside.items()}
        shape = (ids.numel(), spec.shape[1])
        found = replace(self.stored, raw=some(self.stored.raw).reshape(-1), beside=beside, shape=shape)
        return spec.wide(found).view(*ids.shape, spec.shape[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do an operation with the weight widened: all of it, or the items that are asked for."""
        kwargs = kwargs or {}
        op, first = func.overloadpacket, args[0] if args else None
        if isinstance(first, Narrow):
            if op in (_aten.detach, _aten.alias):
                return cls.of(first.spec, first.stored.raw, first.stored.beside)
            if op is _aten.to:
                probe = torch.empty((0,) * first.dim(), dtype=first.dtype, device=first.device)
                if func(probe, *args[1:], **kwargs) is probe:
                    return first
            found = _alone(func, first, args, kwargs)
            if found is not None:
                return found
        if func._schema.is_mutable and isinstance(first, Narrow):
            raise ModelError(
                f"a weight in {first.spec.format} is written to by {op.__name__}; streamed weights are "
                "read-only, as the next load would lose what was written"
            )
        args, kwargs = tree_map_only(Narrow, lambda w: w.wide(), (args, kwargs))
        return func(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the weight as numbers."""
        return self.wide().numpy(force=force)

    def tolist(self) -> Any:
        """Return the weight as numbers in lists."""
        return self.wide().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.spec.format}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Any:
        raise ModelError(f"a weight in {self.spec.format} is copied while it streams; copy the module before")


def _alone(func: Any, weight: Narrow, args: Any, kwargs: Any) -> Tensor | None:
    """Return what an operation gives that needs some items of a weight alone; None for others."""
    op, n = func.overloadpacket, weight.spec.shape[0] if weight.spec.shape else 0
    if op is _aten.embedding and len(args) > 1:
        numbers = torch.arange(n, device=args[1].device).unsqueeze(1)
        return weight._rows(func(numbers, *args[1:], **kwargs).squeeze(-1))  # it refuses what is no row
    if op is _aten.select and not kwargs and args[1] == 0 and isinstance(args[2], int) and -n <= args[2] < n:
        i = args[2] % n
        found = weight._items(i, i + 1)
        return None if found is None else found[0]
    if op is _aten.slice and not kwargs and (args[1:2] or (0,))[0] == 0 and len(args) == 4:
        begin, end = args[2] or 0, n if args[3] is None else min(args[3], n)
        return weight._items(begin, end) if 0 <= begin < end else None
    return None
