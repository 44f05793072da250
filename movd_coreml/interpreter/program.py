"""A function of an ML program, read from its protobuf into plain values and checked from end to end.

Every name must be declared before it is used and once only, every operation known with the inputs it takes,
every constant as long as its type says. What is evaluated is this, so that a damaged or edited model fails
here, by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from blockstream.errors import CheckpointError

from .operations import OPERATORS, Operator
from .types import PACKED_BITS, TORCH, TensorType, read_type

_AGAIN = "the model file was changed or is damaged: export it again"
#: Attributes that describe an operation and are no inputs of it.
_NOTES = frozenset({"name"})


@dataclass(frozen=True, slots=True)
class Blob:
    """A constant in a weight file: its record lies `offset` bytes into the file."""

    name: str
    file: str
    offset: int
    type: TensorType


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant in the model file itself."""

    value: Any


@dataclass(frozen=True, slots=True)
class Name:
    """A value computed before, or an input of the function."""

    name: str


Operand = Blob | Literal | Name


@dataclass(frozen=True)
class Operation:
    """One operation: its operands by input name, and the names and types of its results.

    An input of several values holds a tuple. `drops` are the values nothing needs after it.
    """

    name: str
    operator: Operator
    operands: Mapping[str, Operand | tuple[Operand, ...]]
    results: tuple[tuple[str, TensorType], ...]
    drops: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Operand]:
        for operand in self.operands.values():
            yield from operand if isinstance(operand, tuple) else (operand,)


@dataclass(frozen=True)
class Function:
    """One function of a package: inputs and outputs by name, its operations in order.

    `where` names package and function, for errors. Constants are no operations: they are operands.
    """

    where: str
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Operand]

    def __deepcopy__(self, memo: object) -> Function:
        """Stay the same, as nothing of it changes."""
        return self

    @cached_property
    def blobs(self) -> tuple[Blob, ...]:
        """Return the blobs that are used, each once, in the order they lie."""
        found = {
            operand.offset: operand for op in self.operations for operand in op if isinstance(operand, Blob)
        }
        for name in self.outputs:
            constant = self.constants.get(name)
            if isinstance(constant, Blob):
                found[constant.offset] = constant
        return tuple(blob for _, blob in sorted(found.items()))

    @property
    def weight_file(self) -> str | None:
        """Return the one weight file the blobs are in, as the program names it; None where there are none."""
        return self.blobs[0].file if self.blobs else None


def read_function(message: Any, name: str, where: str) -> Function:
    """Return a function of an mlProgram; CheckpointError names the first operation that is not in order."""
    blocks = message.block_specializations
    if message.opset not in blocks:
        raise CheckpointError(
            f"{where}: has no block for its operation set {message.opset!r} but "
            f"{', '.join(blocks) or 'none'}; {_AGAIN}"
        )
    inputs = {value.name: read_type(value.type, f"{where}: input {value.name!r}") for value in message.inputs}
    reader = _Reader(where, inputs)
    block = blocks[message.opset]
    for operation in block.operations:
        reader.add(operation)
    return reader.function(tuple(block.outputs))


class _Reader:
    """Reads operation after operation; knows what was declared so far."""

    def __init__(self, where: str, inputs: dict[str, TensorType]) -> None:
        self.where, self.inputs = where, inputs
        self.declared: dict[str, TensorType] = dict(inputs)
        self.constants: dict[str, Operand] = {}
        self.operations: list[Operation] = []

    def add(self, message: Any) -> None:
        """Read one operation."""
        named = message.outputs[0].name if message.outputs else "without a result"
        where = f"{self.where}: operation {message.type} {named!r}"
        results = tuple((value.name, read_type(value.type, where)) for value in message.outputs)
        if not results:
            raise CheckpointError(f"{where}: computes nothing; {_AGAIN}")
        for name, _ in results:
            if name in self.declared:
                raise CheckpointError(f"{where}: declares {name!r} again; {_AGAIN}")
        if message.type == "const":
            self._add_constant(message, results[0], where)
        else:
            self._add_operation(message, results, where)
        self.declared.update(results)

    def _add_constant(self, message: Any, result: tuple[str, TensorType], where: str) -> None:
        name, declared = result
        if "val" not in message.attributes:
            raise CheckpointError(f"{where}: is a constant without a value; {_AGAIN}")
        value = message.attributes["val"]
        own = read_type(value.type, where)
        if own != declared:
            raise CheckpointError(f"{where}: declares {declared} and holds {own}; {_AGAIN}")
        self.constants[name] = _constant(value, own, name, where)

    def _add_operation(self, message: Any, results: tuple[tuple[str, TensorType], ...], where: str) -> None:
        if message.blocks:
            raise CheckpointError(
                f"{where}: holds operations of its own, and control flow is not evaluated; export it without"
            )
        operator = OPERATORS.get(message.type)
        if operator is None:
            raise CheckpointError(
                f"{where}: is not one of the {len(OPERATORS)} operations that are evaluated; write the "
                "module without it, or add it to movd_coreml.interpreter"
            )
        operands: dict[str, Operand | tuple[Operand, ...]] = {}
        for key, argument in message.inputs.items():
            bound = tuple(self._operand(b, f"{where}, input {key!r}") for b in argument.arguments)
            operands[key] = bound if key in operator.several else _single(bound, f"{where}, input {key!r}")
        for key, value in message.attributes.items():  # constexpr operations of iOS 16 and 17
            if key not in _NOTES:
                operands[key] = _constant(value, read_type(value.type, where), key, where)
        wrong = operator.mismatch(operands)
        if wrong:
            raise CheckpointError(f"{where}: {wrong}; {_AGAIN}")
        operands.update(
            {k: _plain(operator, k, x, where) for k, x in operands.items() if isinstance(x, Literal)}
        )
        in_order = dict(sorted(operands.items()))  # a map of the protobuf has none
        self.operations.append(Operation(results[0][0], operator, in_order, results))

    def _operand(self, binding: Any, where: str) -> Operand:
        if binding.WhichOneof("binding") == "value":
            return _constant(
                binding.value, read_type(binding.value.type, where), binding.name or "value", where
            )
        if binding.name not in self.declared:
            raise CheckpointError(
                f"{where}: names {binding.name!r}, which is declared nowhere before; {_AGAIN}"
            )
        return self.constants.get(binding.name, Name(binding.name))

    def function(self, outputs: tuple[str, ...]) -> Function:
        """Return what was read, each operation with the values that go after it."""
        for name in outputs:
            if name not in self.declared:
                raise CheckpointError(f"{self.where}: returns {name!r}, which is declared nowhere; {_AGAIN}")
        needed = set(outputs)
        operations: list[Operation] = []
        for op in reversed(self.operations):
            used = {x.name for x in op if isinstance(x, Name)} | {name for name, _ in op.results}
            last = tuple(sorted(used - needed))
            needed |= used
            operations.append(Operation(op.name, op.operator, op.operands, op.results, last))
        types = {name: self.declared[name] for name in outputs}
        function = Function(self.where, self.inputs, types, tuple(reversed(operations)), self.constants)
        files = sorted({blob.file for blob in function.blobs})
        if len(files) > 1:
            raise CheckpointError(
                f"{self.where}: has weights in {files}; packages of one weight file are read"
            )
        return function


def _plain(operator: Operator, key: str, literal: Literal, where: str) -> Literal:
    try:
        return Literal(operator.plain(key, literal.value))
    except (RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}, input {key!r}: is not {operator.takes[key]}: {error}") from error


def _single(bound: tuple[Operand, ...], where: str) -> Operand:
    if len(bound) != 1:
        raise CheckpointError(f"{where}: has {len(bound)} values, expected one; {_AGAIN}")
    return bound[0]


def _constant(message: Any, declared: TensorType, name: str, where: str) -> Operand:
    """Return a constant's value, or its place in a weight file."""
    kind = message.WhichOneof("value")
    if None in declared.shape:
        raise CheckpointError(f"{where}: is a constant of unknown shape {declared}; {_AGAIN}")
    if kind == "blobFileValue":
        if declared.dtype == "STRING":
            raise CheckpointError(f"{where}: has text in a weight file; {_AGAIN}")
        return Blob(name, message.blobFileValue.fileName, message.blobFileValue.offset, declared)
    if kind != "immediateValue" or message.immediateValue.WhichOneof("value") != "tensor":
        raise CheckpointError(f"{where}: is a constant without a tensor; {_AGAIN}")
    return Literal(_literal(message.immediateValue.tensor, declared, where))


def _literal(tensor: Any, declared: TensorType, where: str) -> Any:
    """Return text, or a tensor of the declared type; of sub-byte numbers the packed bytes."""
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values if kind else ()
    count = prod(n or 0 for n in declared.shape)
    if declared.dtype == "STRING":
        text = list(values) if kind == "strings" else []
        if len(text) != count:
            raise CheckpointError(f"{where}: holds {len(text)} texts, declared {count}; {_AGAIN}")
        return text if declared.shape else text[0]
    if kind == "bytes":
        have = len(values)
        if have == declared.nbytes:
            dtype = torch.uint8 if declared.dtype in PACKED_BITS else TORCH[declared.dtype]
            flat = torch.frombuffer(bytearray(values), dtype=dtype) if have else torch.empty(0, dtype=dtype)
            return flat if declared.dtype in PACKED_BITS else flat.reshape(_known(declared))
    else:
        have = len(values)
        if have == count and declared.dtype in TORCH:
            return torch.as_tensor(np.array(values), dtype=TORCH[declared.dtype]).reshape(_known(declared))
    raise CheckpointError(f"{where}: holds {have} {kind or 'values'}, and {declared} was declared; {_AGAIN}")


def _known(declared: TensorType) -> tuple[int, ...]:
    return tuple(n or 0 for n in declared.shape)
