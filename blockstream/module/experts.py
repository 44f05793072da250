"""Mixtures of experts: which parameters hold one expert an item, and their stand-ins while they stream.

A library's experts module keeps all experts of a layer in parameters [experts, ...] and computes with the
items that the router chose, whichever of its implementations runs: item by item (`eager`), gathered
(`batched_mm`) or grouped by expert (`grouped_mm`). So its parameters stay on disk, and items are read as an
operation asks for them, as rows of an embedding's table are. Each group of rows is multiplied as it is when
all weights are there: groups do not see one another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blockstream.errors import ModelError

from .guards import is_compiled, is_item
from .partition import Place
from .reaching import reached
from .standins import Absent
from .weights import Weight, item_of

#: How a library's experts modules may compute: each asks for items alone.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
#: What its decorator of such modules leaves on them.
_MARKS = ("num_experts", "has_gate", "is_transposed", "config")
#: Kernels differ with the address of a weight: an item read alone lies at a multiple of this.
ALIGN = 64
_aten = torch.ops.aten


@dataclass(frozen=True)
class Experts:
    """The weights of one experts module at `path` that are read by item: by name, `count` items each."""

    path: str
    weights: Mapping[str, Weight]
    count: int
    table: ClassVar[type[Absent]]

    def item(self, kind: str, i: int) -> Weight:
        """Return one expert's item of a weight, read alone."""
        item = item_of(self.weights[kind], i)
        assert item is not None, f"{kind} of {self.path} is divisible"
        return item

    def chosen(self, inputs: Any) -> list[int]:
        """Return the experts that a module's inputs route to, in order: the first integers among them."""
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32):
                return [i for i in torch.unique(tensor).tolist() if 0 <= i < self.count]
        return []

    @property
    def places(self) -> tuple[Place, ...]:
        """Return where the weights are bound."""
        return tuple(Place(self.path, name) for name in self.weights)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all items in memory."""
        return sum(w.nbytes for w in self.weights.values())

    @property
    def item_nbytes(self) -> int:
        """Return the bytes of one expert in memory."""
        return self.nbytes // self.count


def find_experts(root: nn.Module, weights: Mapping[str, Weight]) -> tuple[dict[str, Experts], dict[str, str]]:
    """Return a module's experts by path, and why those of other paths are read whole.

    `weights` by the parameters' paths.
    """
    found: dict[str, Experts] = {}
    whole: dict[str, str] = {}
    uses = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))
    taken = reached(root)
    outer = [m for path, m in root.named_modules() if is_compiled(m) and is_item(path)]
    compiled = {id(m) for each in outer for m in each.modules()}
    for path, module in root.named_modules():
        stacked = dict(_stacked(module))
        if not stacked:
            continue
        reason = "they are compiled with it" if id(module) in compiled else _custom(module)
        if reason is None and any(uses[id(p)] > 1 or id(p) in taken for p in stacked.values()):
            reason = "others use their weights as well"
        items = {name: weights.get(f"{path}.{name}" if path else name) for name in stacked}
        if reason is None and not all(w is not None and _is_divisible(w) for w in items.values()):
            reason = "an expert's bytes cannot be read, or do not lie, by themselves"
        if reason is None:
            made = {name: w for name, w in items.items() if w is not None}
            found[path] = Experts(path, made, next(iter(made.values())).shape[0])
        else:
            whole[path] = reason
    return found, whole


def _stacked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module that have a matrix an expert."""
    count = getattr(module, "num_experts", None)
    if isinstance(count, int) and count > 1:
        for name, param in module._parameters.items():
            if param is not None and param.dim() >= 3 and param.shape[0] == count:
                yield name, param


def _custom(module: nn.Module) -> str | None:
    """Return why a module may compute with more than the experts that are routed to; None if it does not."""
    if not all(hasattr(module, mark) for mark in _MARKS) or "forward" in module.__dict__:
        return "their module computes in a way of its own"
    how = getattr(module.config, "_experts_implementation", None) or "eager"
    return None if how in _IMPLEMENTATIONS else f"their implementation is {how}"


def _is_divisible(weight: Weight) -> bool:
    """Return whether each item can be read alone, and lies where it would among the others."""
    if weight.spec is None and (weight.nbytes // weight.shape[0]) % ALIGN:
        return False
    return item_of(weight, 0) is not None


class ExpertTable(Absent):
    """A parameter [experts, ...] on disk: `expert(i)` reads one of it. `is_turned`: they are transposed."""

    expert: Callable[[int], Tensor]
    #: Returns what is in memory first.
    sooner: Callable[[list[int]], list[int]]
    is_turned = False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Read the items that an operation asks for; otherwise as any absent parameter."""
        kwargs = kwargs or {}
        op, table = func.overloadpacket, args[0] if args else None
        if isinstance(table, ExpertTable) and hasattr(table, "expert"):
            if op is _aten.transpose and {d % table.dim() for d in args[1:3]} == {1, 2} and table.dim() == 3:
                return table._turned()
            if op is _aten.select and args[1] == 0:
                return table._one(args[2])
            if op is _aten.index and len(args[1]) == 1 and not args[1][0].is_floating_point():
                return table._gathered(args[1][0])
        if _groups(func) and isinstance(args[1], ExpertTable) and hasattr(args[1], "expert"):
            return args[1]._grouped(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _turned(self) -> ExpertTable:
        """Return the same table with its items transposed."""
        count, rows, columns = self.shape
        with torch.inference_mode(False):
            made: Any = torch.Tensor._make_wrapper_subclass(
                type(self),
                (count, columns, rows),
                strides=(rows * columns, *reversed(self.stride()[1:])),
                dtype=self.dtype,
                device=self.device,
                requires_grad=False,
            )
        made.what, made.expert, made.sooner = self.what, self.expert, self.sooner
        made.is_turned = not self.is_turned
        return made  # type: ignore[no-any-return]

    def _one(self, i: int) -> Tensor:
        """Return an item, a view where its numbers lie."""
        item = self.expert(i % len(self))
        return item.transpose(0, 1) if self.is_turned else item

    def _gathered(self, ids: Tensor) -> Tensor:
        """Return copies of items, [*ids.shape, ...]."""
        if ids.dtype in (torch.bool, torch.uint8):
            raise ModelError(f"{self.what} is indexed by a mask, and its experts are read by their numbers")
        made = torch.empty((*ids.shape, *self.shape[1:]), dtype=self.dtype, device=self.device)
        flat, where = made.view(-1, *self.shape[1:]), ids.reshape(-1)
        for i in self.sooner(torch.unique(where).tolist()):
            flat[where == i] = self._one(i)
        return made

    def _grouped(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the product of rows with the item of their group, group by group.

        `args`: rows [n, columns], the table, where each group ends; groups lie one after another.
        """
        rows, _, ends, *rest = args
        spans, begin = {}, 0
        for i, end in enumerate(ends.tolist()):
            if end > begin:
                spans[i] = slice(begin, end)
            begin = max(begin, end)
        made: Tensor | None = None
        for i in self.sooner(list(spans)):
            some = rows[spans[i]]
            end = torch.tensor([len(some)], dtype=ends.dtype, device=ends.device)
            # Nothing holds the item while the next is waited for: its room may be that one's.
            product = func(some, self._one(i).unsqueeze(0), end, *rest, **kwargs)
            if made is None:
                made = product.new_zeros(len(rows), product.shape[1])
            made[spans[i]] = product
        return made if made is not None else rows.new_zeros(len(rows), self.shape[2])


def _groups(func: Any) -> bool:
    """Return whether an operation multiplies groups of rows, one matrix each."""
    return func.overloadpacket is _aten._grouped_mm or str(func).startswith("transformers.grouped_mm_fall")


Experts.table = ExpertTable
