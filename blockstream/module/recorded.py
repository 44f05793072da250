"""Operations as text: written down where a forward runs without data, run again on random operands.

What would take long is run on fewer rows, heads or places, and its time brought to the whole: the widths that
kernels depend on stay.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockstream.plan.operations import Op, Work

#: The most arithmetic, and the most bytes of operands, of an operation that is run as it is.
MOST_FLOPS, MOST_NBYTES = 1.5e9, 48 << 20
#: The most arithmetic beside other work, which interrupts whatever takes longer than a few milliseconds.
BESIDE_FLOPS = 2e8
#: An operation that reads its operands so seldom again is run on others each time: caches would hold them.
FEW_FLOPS_A_BYTE, CACHES_NBYTES = 8.0, 96 << 20

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten._weight_int8pack_mm}
_CONVOLUTIONS = {_aten.convolution, _aten.mkldnn_convolution, _aten.thnn_conv2d, _aten.slow_conv3d}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_attention_math,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
}


class _UnknownError(Exception):
    """An argument that has no text."""


class Written:
    """The operations of a forward as they come, by the module that is being called."""

    def __init__(self) -> None:
        self._inside: list[str] = [""]
        self._ops: dict[Op, int] = {}
        self._own: defaultdict[str, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))

    def enter(self, path: str) -> None:
        """Begin a call of a module."""
        self._inside.append(path)

    def leave(self) -> None:
        """End it."""
        self._inside.pop()

    def add(
        self, func: Any, args: Any, kwargs: Any, flops: float, results: Sequence[Tensor], n: float
    ) -> None:
        """Count an operation `n` times."""
        op = written(func, args, kwargs, flops, results)
        self._own[self._inside[-1]][self._ops.setdefault(op, len(self._ops))] += n

    def work(self, times: Mapping[str, int]) -> Work:
        """Return what has been done by a forward that has called its modules so many times."""
        return Work(tuple(self._ops), {path: dict(counts) for path, counts in self._own.items()}, times)


def written(func: Any, args: Any, kwargs: Any, flops: float, results: Sequence[Tensor]) -> Op:
    """Return the operation of a call; it has no spec where an argument has no text."""
    op = func.overloadpacket
    given: list[Tensor] = []
    try:
        said = [op.__name__, func._overloadname, _text(args, given), _text(dict(kwargs), given)]
        spec = json.dumps(said, separators=(",", ":"))
    except _UnknownError:
        spec = ""
    tensors = [*given, *results]
    nbytes = float(sum(t.numel() * t.element_size() for t in tensors))
    largest = max(tensors, key=lambda t: t.numel(), default=None)
    dtype = "" if largest is None else str(largest.dtype).removeprefix("torch.")
    return Op(spec, _kind(op), flops, nbytes, dtype)


def _kind(op: Any) -> str:
    for kind, ops in (("product", _PRODUCTS), ("attention", _ATTENTION), ("convolution", _CONVOLUTIONS)):
        if op in ops:
            return kind
    return "memory"


def _text(x: Any, given: list[Tensor]) -> Any:
    if isinstance(x, Tensor):
        given.append(x)
        strides = [int(n) for n in x.stride()] if x.layout == torch.strided else []
        return {"t": str(x.dtype).removeprefix("torch."), "s": [int(n) for n in x.shape], "d": strides}
    if isinstance(x, bool | int | float | str | type(None)):
        return x
    if isinstance(x, list | tuple):
        return [_text(part, given) for part in x]
    if isinstance(x, dict):
        return {str(k): _text(v, given) for k, v in x.items()}
    if isinstance(x, torch.dtype | torch.layout | torch.memory_format):
        return {"of": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"at": "cpu"}
    raise _UnknownError


class Runnable(NamedTuple):
    """A call that can be timed; the operation that it stands for takes `times` as long."""

    call: Callable[[], Any]
    times: float


def runnable(op: Op, most_nbytes: int = MOST_NBYTES, most_flops: float = MOST_FLOPS) -> Runnable | None:
    """Return an operation ready to be run on random operands, on fewer of them where it would take long.

    None where it has no spec, or cannot be run on so many bytes.
    """
    if not op.spec:
        return None
    name, overload, args, kwargs = json.loads(op.spec)
    times = _shrunk(op, args, min(most_nbytes, MOST_NBYTES), most_flops)
    nbytes = sum(_nbytes(t) for t in _tensors([args, kwargs]))
    if nbytes > 2 * most_nbytes:
        return None
    sets = 1
    if op.kind == "product" and op.flops < FEW_FLOPS_A_BYTE * op.nbytes:
        sets = max(1, min(8, CACHES_NBYTES // max(1, nbytes), most_nbytes // max(1, nbytes)))
    function = getattr(getattr(_aten, name), overload or "default")
    operands = [(_made(args), _made(kwargs)) for _ in range(sets)]
    turn = 0

    def call() -> Any:
        nonlocal turn
        turn = (turn + 1) % sets
        given, named = operands[turn]
        return function(*given, **named)

    return Runnable(call, times)


def _shrunk(op: Op, args: list[Any], most_nbytes: int, most_flops: float) -> float:
    """Shorten the operands of a long operation in place; return how much longer the whole one takes."""
    tensors = list(_tensors(args))
    if op.kind == "memory":
        if op.nbytes <= most_nbytes or not tensors:
            return 1.0
        return _shorter(
            tensors, tensors[0]["s"], [max(max(t["s"], default=1) for t in tensors)], op.nbytes / most_nbytes
        )
    over = max(op.flops / most_flops, op.nbytes / most_nbytes)
    if over <= 1 or len(tensors) < 2:
        return 1.0
    if op.kind == "product":
        a, b = tensors[-2], tensors[-1]
        if len(a["s"]) == 3:
            return _fewer(tensors, a, 0, over, 1) * _fewer([a, *tensors[:-2]], a, 1, over, 64)
        columns = _fewer([b, *tensors[:-2]], b, -1, over, 256)
        return columns * _fewer([a], a, 0, over / columns, 256)
    if op.kind == "attention":
        q = tensors[0]
        heads = _fewer(tensors, q, 0, over, 1)
        heads *= _fewer(tensors, q, 1, over / heads, 2)
        return heads * _fewer([q], q, 2, over / heads, 256)
    x, weight = tensors[0], tensors[1]
    done = _fewer([x], x, 0, over, 1)
    for axis in range(len(x["s"]) - 1, 1, -1):
        done *= _fewer([x], x, axis, over / done, 8 + weight["s"][axis])
    return done


def _fewer(
    tensors: Sequence[dict[str, Any]], of: dict[str, Any], axis: int, over: float, least: int
) -> float:
    """Cut an axis of one operand, and of those as long there, to a part of it; return the part's inverse."""
    before = of["s"][axis]
    after = max(min(before, least), int(before / max(over, 1.0)))
    for t in tensors:
        if (
            len(t["s"]) >= abs(axis)
            and t["s"]
            and -len(t["s"]) <= axis < len(t["s"])
            and t["s"][axis] == before
        ):
            _set(t, axis, after)
    return float(before / after) if after else 1.0


def _shorter(
    tensors: Sequence[dict[str, Any]], shape: Sequence[int], longest: Sequence[int], over: float
) -> float:
    """Cut the longest axis of all operands that have one so long."""
    before = longest[0]
    after = max(1, int(before / over))
    for t in tensors:
        if before in t["s"]:
            _set(t, t["s"].index(before), after)
    return before / after


def _set(t: dict[str, Any], axis: int, length: int) -> None:
    """Give an operand another length, dense, its axes in memory in the order they were in."""
    t["s"][axis] = length
    order = sorted(range(len(t["s"])), key=lambda i: t["d"][i]) if t["d"] else []
    step = 1
    for i in order:
        if t["d"][i]:
            t["d"][i] = step
            step *= max(1, t["s"][i])


def _tensors(x: Any) -> Any:
    if isinstance(x, dict):
        if "t" in x and "s" in x:
            yield x
        else:
            for v in x.values():
                yield from _tensors(v)
    elif isinstance(x, list):
        for v in x:
            yield from _tensors(v)


def _nbytes(t: dict[str, Any]) -> int:
    return prod(t["s"]) * getattr(torch, t["t"]).itemsize if t["s"] else 8


def _made(x: Any) -> Any:
    """Return an argument from its text: operands of random numbers between 0 and 1, of zeros where whole."""
    if isinstance(x, list):
        return [_made(part) for part in x]
    if not isinstance(x, dict):
        return x
    if "t" in x and "s" in x:
        return _operand(x)
    if "of" in x:
        return getattr(torch, x["of"])
    if "at" in x:
        return torch.device(x["at"])
    return {k: _made(v) for k, v in x.items()}


def _operand(t: dict[str, Any]) -> Tensor:
    dtype, shape, strides = getattr(torch, t["t"]), t["s"], t["d"]
    held = 1 + sum((n - 1) * d for n, d in zip(shape, strides, strict=False)) if all(shape) else 0
    if dtype.is_floating_point:
        flat = (
            torch.empty(max(held, 0), dtype=dtype).uniform_(0.1, 1.0)
            if dtype.itemsize > 1
            else (torch.zeros(held, dtype=torch.uint8).view(dtype))
        )
    elif dtype is torch.bool:
        flat = torch.ones(held, dtype=dtype)
    else:
        flat = torch.zeros(held, dtype=dtype)
    return flat.as_strided(shape, strides) if strides or not shape else flat.view(shape)


def product(dtype: str) -> Op:
    """Return a product of two square matrices that fit the caches, in float32 for dtypes without one."""
    kind = getattr(torch, dtype, torch.float32)
    kind = kind if kind.is_floating_point and kind.itemsize > 1 else torch.float32
    side = 768 if kind is torch.float32 else 512
    a = torch.empty(side, side, dtype=kind, device="meta")
    return written(_aten.mm.default, (a, a), {}, 2.0 * side**3, [a])
