"""The types a program declares, as torch has them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from blockstream.errors import CheckpointError

from .proto import messages

#: What a tensor of a type is held as. The whole numbers below eight bits exist in weight files only.
TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "BFLOAT16": torch.bfloat16,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
}
#: Bits of the numbers that are packed into bytes, lowest first. (Those of three and six bits lie otherwise.)
PACKED_BITS = {"INT4": 4, "UINT4": 4, "UINT2": 2, "UINT1": 1}
_NAMES = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype by its name in the protobuf, and a shape; None is a dimension known only when it runs."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype.lower()}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    @property
    def nbytes(self) -> int:
        """Return the bytes of a tensor of this type in a weight file; its shape is known."""
        count = prod(n or 0 for n in self.shape)
        if self.dtype in PACKED_BITS:
            return -(-count * PACKED_BITS[self.dtype] // 8)
        return int(count * TORCH[self.dtype].itemsize)

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return whether a tensor of this shape and dtype is one of this type."""
        return (
            TORCH.get(self.dtype) is dtype
            and len(shape) == len(self.shape)
            and all(want in (None, have) for want, have in zip(self.shape, shape, strict=True))
        )


def type_of(value: Any) -> str:
    """Return the type a value has, in words."""
    if isinstance(value, Tensor):
        name = _NAMES.get(value.dtype, str(value.dtype))
        return str(TensorType(name, tuple(value.shape)))
    if isinstance(value, tuple | list):
        return f"{len(value)} values"
    return "string" if isinstance(value, str) else type(value).__name__


def read_type(message: Any, where: str) -> TensorType:
    """Return the tensor type of a protobuf ValueType; CheckpointError for any other kind of value."""
    kind = message.WhichOneof("type")
    if kind != "tensorType":
        raise CheckpointError(
            f"{where}: has a value of type {kind or 'unset'}; only tensors are evaluated, so export it "
            "without lists, dictionaries and states"
        )
    tensor = message.tensorType
    _, mil = messages()
    try:
        dtype = mil.DataType.Name(tensor.dataType)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: has the unknown data type {tensor.dataType}; export it again"
        ) from error
    if dtype not in TORCH and dtype not in PACKED_BITS and dtype != "STRING":
        raise CheckpointError(
            f"{where}: has the data type {dtype}, which is not evaluated; export it in another"
        )
    shape = tuple(
        d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions
    )
    if tensor.rank not in (-1, len(shape)):
        raise CheckpointError(
            f"{where}: declares rank {tensor.rank} and {len(shape)} dimensions; the model file was changed "
            "or is damaged: export it again"
        )
    return TensorType(dtype, shape)
