"""The table of operations, and how one is called: typed inputs, half precision computed in single.

An operator is a function whose parameters are named as the operation's inputs in the Core ML specification.
Its annotations say what it takes: a `Tensor`, several `Tensors`, or a small constant as `Int`, `Ints`,
`Flag`, `Flags`, `Number`, `Text`; with ` | None` where it may be left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Int: TypeAlias = int
Ints: TypeAlias = list[int]
Flag: TypeAlias = bool
Flags: TypeAlias = list[bool]
Number: TypeAlias = float
Text: TypeAlias = str

Compute: TypeAlias = Any
"""What computes: a function, or one of torch's own, which have no one type."""
F = TypeVar("F", bound=Callable[..., Any])


def _list_of(kind: type) -> Callable[[Any], Any]:
    return lambda value: [kind(n) for n in value.reshape(-1).tolist()] if isinstance(value, Tensor) else value


def _one(kind: type) -> Callable[[Any], Any]:
    return lambda value: kind(value.item()) if isinstance(value, Tensor) else value


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "Tensor": lambda value: value,
    "Tensors": tuple,
    "Int": _one(int),
    "Ints": _list_of(int),
    "Flag": _one(bool),
    "Flags": _list_of(bool),
    "Number": _one(float),
    "Text": lambda value: value,
}


@dataclass(frozen=True)
class Operator:
    """One operation: what computes it, and what its inputs are.

    One that only moves numbers gets them as they are. Any other gets half-precision tensors in single
    precision, and its result is rounded once: the model of fp16 evaluated here, not any device's.
    """

    type: str
    compute: Compute
    takes: Mapping[str, str]
    needed: frozenset[str]
    moves: bool

    def plain(self, key: str, value: Any) -> Any:
        """Return a constant as this input takes it: a small one becomes a number, a list or text once."""
        kind = self.takes.get(key, "Tensor")
        return value if kind in ("Tensor", "Tensors") else _CONVERT[kind](value)

    @property
    def several(self) -> frozenset[str]:
        """Return the inputs that take several values."""
        return frozenset(key for key, kind in self.takes.items() if kind == "Tensors")

    def mismatch(self, given: Mapping[str, Any]) -> str:
        """Return in words which inputs are missing or not known, "" where all is in order."""
        missing, extra = sorted(self.needed - given.keys()), sorted(given.keys() - self.takes.keys())
        if missing:
            return f"lacks its inputs {missing}"
        return f"has inputs {extra} that are not evaluated; it takes {sorted(self.takes)}" if extra else ""

    def __call__(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the results for the inputs given, tensors or text."""
        arguments, half = {}, False
        for key, value in given.items():
            kind = self.takes[key]
            if not self.moves and kind in ("Tensor", "Tensors"):
                half = half or _is_half(value)
                value = _widened(value)
            arguments[key] = _CONVERT[kind](value)
        made = self.compute(**arguments)
        results = made if isinstance(made, tuple) else (made,)
        if half:
            results = tuple(r.half() if r.dtype is torch.float32 else r for r in results)
        return results


OPERATORS: dict[str, Operator] = {}


def operator(*types: str, moves: bool = False) -> Callable[[F], F]:
    """Enter a function in the table under the names of the operations it computes."""

    def enter(compute: F) -> F:
        for name in types:
            OPERATORS[name] = _describe(name, compute, moves)
        return compute

    return enter


def enter(name: str, compute: Compute, takes: str) -> None:
    """Enter a function of tensors alone; `takes` names them, "x" or "x y"."""
    keys = takes.split()
    OPERATORS[name] = Operator(
        name,
        lambda **given: compute(*(given[key] for key in keys)),
        dict.fromkeys(keys, "Tensor"),
        frozenset(keys),
        moves=False,
    )


def _describe(name: str, compute: Compute, moves: bool) -> Operator:
    parameters = inspect.signature(compute).parameters.values()
    takes = {p.name: str(p.annotation).removesuffix(" | None") for p in parameters}
    unknown = set(takes.values()) - _CONVERT.keys()
    if unknown:
        raise TypeError(f"{name}: inputs annotated {sorted(unknown)}, expected {sorted(_CONVERT)}")
    needed = frozenset(p.name for p in parameters if p.default is p.empty)
    return Operator(name, compute, takes, needed, moves)


def _is_half(value: Any) -> bool:
    return any(_is_half(v) for v in value) if isinstance(value, tuple) else value.dtype is torch.float16


def _widened(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_widened, value))
    return value.float() if value.dtype is torch.float16 else value
