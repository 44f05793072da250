"""Evaluate a function: one operation after another, each result held against its declared type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from blockstream.errors import CheckpointError, ModelError

from .operations.weights import unpack
from .program import Blob, Function, Literal, Operand, Operation
from .types import PACKED_BITS, TORCH, TensorType, type_of
from .weights import BlobReader

#: watch(operation, name, value): called with each result of each operation.
Watch = Callable[[Operation, str, Tensor], None]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A result that is not all finite: how many numbers are NaN, how many infinite.

    `began` says whether everything the operation was given was finite.
    """

    operation: str
    type: str
    nans: int
    infinities: int
    began: bool

    def __str__(self) -> str:
        since = "" if self.began else ", as were its inputs"
        return f"{self.type} {self.operation!r}: {self.nans} NaN, {self.infinities} infinite{since}"


@dataclass
class FiniteWatch:
    """Notes each result that is not all finite. Pass it as `watch`."""

    found: list[NonFinite] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def __call__(self, operation: Operation, name: str, value: Tensor) -> None:
        """Look at one result."""
        if not value.is_floating_point() or bool(torch.isfinite(value).all()):
            return
        given = {x.name for x in operation if not isinstance(x, Literal)}
        infinities = int(torch.isinf(value).sum())
        nans = int(torch.isnan(value).sum())
        self.found.append(
            NonFinite(name, operation.operator.type, nans, infinities, began=not given & self._names)
        )
        self._names.add(name)

    @property
    def causes(self) -> list[NonFinite]:
        """Return the operations that turned finite numbers into others."""
        return [x for x in self.found if x.began]


@torch.no_grad()
def evaluate(
    function: Function, inputs: Mapping[str, Tensor], blob: BlobReader, watch: Watch | None = None
) -> dict[str, Tensor]:
    """Return the outputs of a function by name.

    `blob(offset, nbytes)` gives the weights; nothing returned shares memory with them. Raises ModelError for
    inputs other than declared, CheckpointError where a result is not of the type the program declares.
    """
    values: dict[str, Any] = dict(_checked(function, inputs))
    weights = _Weights(blob)
    for operation in function.operations:
        given = {
            key: tuple(_resolve(x, values, weights) for x in operand)
            if isinstance(operand, tuple)
            else _resolve(operand, values, weights)
            for key, operand in operation.operands.items()
        }
        results = _compute(function, operation, given)
        for (name, declared), value in zip(operation.results, results, strict=True):
            _check(function, operation, name, declared, value)
            if watch is not None:
                watch(operation, name, value)
            values[name] = value
        for name in operation.drops:
            values.pop(name, None)
    return {name: _output(function, name, values, weights) for name in function.outputs}


class _Weights:
    """Reads blobs, and knows again what shares their memory."""

    def __init__(self, blob: BlobReader) -> None:
        self._blob = blob
        self._storages: set[int] = set()

    def __call__(self, offset: int, nbytes: int) -> Tensor:
        data = self._blob(offset, nbytes)
        self._storages.add(data.untyped_storage()._cdata)
        return data

    def own(self, value: Tensor) -> bool:
        """Return whether a tensor lies in the memory of weights."""
        return value.untyped_storage()._cdata in self._storages


def _checked(function: Function, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the inputs if they are those declared."""
    if inputs.keys() != function.inputs.keys():
        raise ModelError(
            f"{function.where}: takes the inputs {sorted(function.inputs)} and was given {sorted(inputs)}"
        )
    for name, declared in function.inputs.items():
        value = inputs[name]
        if not declared.fits(tuple(value.shape), value.dtype):
            raise ModelError(
                f"{function.where}: input {name!r} is {type_of(value)} and the package takes {declared}; it "
                "was exported for another size: use the package of this preset"
            )
    return inputs


def _resolve(operand: Operand, values: Mapping[str, Any], blob: BlobReader) -> Any:
    if isinstance(operand, Literal):
        return operand.value
    if isinstance(operand, Blob):
        return blob_tensor(operand, blob)
    return values[operand.name]


def blob_tensor(blob: Blob, read: BlobReader) -> Tensor:
    """Return a blob as a tensor: a view of its bytes, or of packed numbers their own in int8 or uint8."""
    data = read(blob.offset, blob.type.nbytes)
    shape = [n or 0 for n in blob.type.shape]
    bits = PACKED_BITS.get(blob.type.dtype)
    if bits is not None:
        return unpack(data, bits, prod(shape), signed=blob.type.dtype.startswith("INT")).reshape(shape)
    return data.view(TORCH[blob.type.dtype]).reshape(shape)


def _compute(function: Function, operation: Operation, given: Mapping[str, Any]) -> tuple[Any, ...]:
    where = f"{function.where}: operation {operation.operator.type} {operation.name!r}"
    try:
        results = operation.operator(given)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        takes = ", ".join(f"{key} {type_of(value)}" for key, value in given.items())
        raise CheckpointError(f"{where} cannot be computed of {takes}: {error}") from error
    if len(results) != len(operation.results):
        raise CheckpointError(f"{where}: has {len(results)} results, declared {len(operation.results)}")
    return results


def _check(function: Function, operation: Operation, name: str, declared: TensorType, value: Any) -> None:
    """Refuse a result that is not what the program declares."""
    if isinstance(value, Tensor) and declared.fits(tuple(value.shape), value.dtype):
        return
    raise CheckpointError(
        f"{function.where}: operation {operation.operator.type} {operation.name!r} declares {name!r} as "
        f"{declared} and computes {type_of(value)}; the model file was changed or is damaged"
    )


def _output(function: Function, name: str, values: Mapping[str, Any], weights: _Weights) -> Tensor:
    """Return an output, copied where it is a constant or a view of one."""
    constant = function.constants.get(name)
    value = values[name] if constant is None else _resolve(constant, values, weights)
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{function.where}: returns {name!r}, which is {type_of(value)}")
    return value.clone() if constant is not None or weights.own(value) else value
