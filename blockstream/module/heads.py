"""A large linear layer outside the blocks (a language model's head), multiplied some rows at a time.

It is cut so where memory has no room for it whole. An output's columns are products with rows of the weight,
each a sum by itself. That kernels round them alike with fewer rows is looked at in the first call of each
shape: where they do not, the call is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError

from .experts import Experts, find_experts
from .guards import is_item
from .reaching import reached
from .standins import Absent
from .weights import Weight

#: A layer from this size on is cut, into parts of about so much.
HEAD_NBYTES = 128 << 20
PART_NBYTES = 8 << 20
_aten = torch.ops.aten


class HeadTable(Absent):
    """The weight [rows, columns] of a linear layer on disk: `expert(i)` reads its i-th part.

    `turned`: what it is transposed and expanded to, as matmul does with it, [batch..., columns, rows].
    """

    expert: Callable[[int], Tensor]
    sooner: Callable[[list[int]], list[int]]
    turned: tuple[int, ...] = ()
    agreed: set[tuple[int, ...]]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Multiply part by part; otherwise as any absent parameter."""
        op, first, last = func.overloadpacket, args[0], args[-1]
        if isinstance(first, HeadTable) and hasattr(first, "expert") and not kwargs:
            if op in (_aten.t, _aten.transpose) and not first.turned:
                return first._as((first.shape[1], first.shape[0]))
            if op is _aten.expand and first.turned and tuple(args[1][-2:]) in (first.turned[-2:], (-1, -1)):
                return first._as((*args[1][:-2], *first.turned[-2:]))
            if op in (_aten.view, _aten._unsafe_view, _aten.reshape) and tuple(args[1]) == first.turned:
                return first._as(first.turned)
        if isinstance(last, HeadTable) and hasattr(last, "expert") and last.turned and not kwargs:
            if op in (_aten.mm, _aten.bmm):
                return last._product(func, (args[0],), None)
            if op is _aten.addmm:
                return last._product(func, (args[1],), args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _as(self, shape: tuple[int, ...]) -> HeadTable:
        """Return the same weight as operations of matmul's see it, transposed."""
        strides = (*[0] * (len(shape) - 2), 1, shape[-2])
        with torch.inference_mode(False):
            made: Any = torch.Tensor._make_wrapper_subclass(
                type(self), shape, strides=strides, dtype=self.dtype, device=self.device, requires_grad=False
            )
        made.what, made.expert, made.sooner = self.what, self.expert, self.sooner
        if not hasattr(self, "agreed"):
            self.agreed = set()
        made.turned, made.agreed = shape, self.agreed
        return made  # type: ignore[no-any-return]

    def _product(self, func: Any, x: tuple[Tensor], bias: Tensor | None) -> Tensor:
        """Return x [batch..., n, columns] times the weight, transposed, and the bias: [batch..., n, rows]."""
        *batch, columns, rows = self.turned
        per = _rows_a_part(columns, self.element_size())
        count = -(-rows // per)

        def times(weight: Tensor, some: slice) -> Tensor:
            turned = weight.t().expand(*batch, columns, len(weight))
            result: Tensor = func(*([] if bias is None else [bias[some]]), *x, turned)
            return result

        made = torch.empty((*x[0].shape[:-1], rows), dtype=x[0].dtype, device=x[0].device)
        for i in self.sooner(list(range(count))):
            some = slice(i * per, min((i + 1) * per, rows))
            made[..., some] = times(self.expert(i), some)
        shape = (*x[0].shape, *x[0].stride(), torch.get_num_threads())
        if shape not in self.agreed and count > 1:
            both = torch.cat([self.expert(0), self.expert(1)])
            some = slice(0, len(both))
            if not torch.equal(times(both, some).nan_to_num(), made[..., some].nan_to_num()):
                raise ModelError(
                    f"{self.what} is multiplied some rows at a time to fit, and this processor rounds that "
                    "otherwise than all rows at once; name a larger budget, with room for it whole"
                )
            self.agreed.add(shape)
        return made


def _rows_a_part(columns: int, item_nbytes: int) -> int:
    """Return how many rows a part has: a multiple of 64, so that all parts lie alike."""
    return max(PART_NBYTES // (columns * item_nbytes) // 64, 1) * 64


@dataclass(frozen=True)
class Head(Experts):
    """One linear layer that is read by parts of its rows."""

    table = HeadTable

    @property
    def item_nbytes(self) -> int:
        """Return the bytes of one part in memory."""
        (weight,) = self.weights.values()
        return min(weight.nbytes, _per(weight) * (weight.nbytes // weight.shape[0]))

    def item(self, kind: str, i: int) -> Weight:
        """Return one part, read alone."""
        weight = self.weights[kind]
        (whole,) = weight.tensors
        rows = min(_per(weight), weight.shape[0] - i * _per(weight))
        row_nbytes, shape = whole.nbytes // weight.shape[0], (rows, weight.shape[1])
        offset = whole.offset + i * _per(weight) * row_nbytes
        part = replace(whole, shape=shape, offset=offset, nbytes=rows * row_nbytes)
        request = replace(weight.requests[0], tensors=(part,), shape=shape)
        return replace(weight, requests=(request,), tensors=(part,), shape=shape)

    def chosen(self, inputs: Any) -> list[int]:
        """Return all parts: each is needed."""
        return list(range(self.count))


def _per(weight: Weight) -> int:
    return _rows_a_part(weight.shape[1], weight.nbytes // (weight.shape[0] * weight.shape[1]))


def read_apart(root: nn.Module, weights: Mapping[str, Weight], finest: bool) -> tuple[Experts, ...]:
    """Return what of a module is read by parts: experts, and in the `finest` cut its heads."""
    heads = _heads(root, weights) if finest else ()
    return (*find_experts(root, weights)[0].values(), *heads)


def _heads(root: nn.Module, weights: Mapping[str, Weight]) -> Iterator[Head]:
    """Yield the large linear layers of a module that are in no list, and whose weights are nobody else's."""
    uses = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))
    taken = reached(root)
    for path, module in root.named_modules():
        weight = weights.get(f"{path}.weight")
        if type(module) is not nn.Linear or weight is None or is_item(path):
            continue
        shared = uses[id(module.weight)] > 1 or id(module.weight) in taken
        plain = weight.spec is None and len(weight.tensors) == 1
        if plain and not shared and weight.nbytes >= HEAD_NBYTES:
            yield Head(path, {"weight": weight}, -(-weight.shape[0] // _per(weight)))
