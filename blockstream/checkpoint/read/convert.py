"""Convert elements between floating dtypes as torch does, without torch: F64, F32, F16, BF16, and from F8.

Everything goes by float32, as in torch. bfloat16 is its upper half; rounding is to nearest, ties to
even; a NaN becomes 0x7fc0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_NUMPY: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}
#: Dtypes of one byte: exponent bits, mantissa bits, exponent bias, and what the largest exponents mean.
FLOAT8: dict[str, tuple[int, int, int, str]] = {
    "F8_E4M3": (4, 3, 7, "nan"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "unsigned zero"),
    "F8_E5M2FNUZ": (5, 2, 16, "unsigned zero"),
}
#: Elements converted at once: small enough that the temporaries stay in the cache.
STEP = 1 << 15


def can_convert(src: str, dst: str) -> bool:
    """Return whether elements of dtype `src` can be brought to `dst`."""
    return src == dst or ((src in _NUMPY or src in FLOAT8) and dst in _NUMPY)


def convert(src: memoryview, src_dtype: str, dst: memoryview, dst_dtype: str) -> None:
    """Write the elements of `src` to `dst`, which has room for exactly as many. No overlap.

    Values beyond a dtype's range become infinities, as in torch. Raises ValueError for a pair that
    cannot be converted.
    """
    if src_dtype == dst_dtype:
        dst[:] = src
        return
    if not can_convert(src_dtype, dst_dtype):
        raise ValueError(f"no conversion from {src_dtype} to {dst_dtype}")
    a, b = np.frombuffer(src, _NUMPY.get(src_dtype, np.uint8)), np.frombuffer(dst, _NUMPY[dst_dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        for begin, values in _as_float32(a, src_dtype):
            out = b[begin : begin + len(values)]
            if dst_dtype == "BF16":
                _round_to_bfloat16(values, out)
            else:
                out[:] = values


def _as_float32(a: npt.NDArray[Any], dtype: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield the elements as float32, step by step, each with its place."""
    wide = np.empty(STEP, np.float32)
    for begin in range(0, len(a), STEP):
        part = a[begin : begin + STEP]
        values = wide[: len(part)]
        if dtype == "F32":
            values = part
        elif dtype in FLOAT8:
            np.take(_values(dtype), part, out=values)
        elif dtype == "BF16":
            bits = values.view(np.uint32)
            bits[:] = part
            bits <<= np.uint32(16)
        else:
            values[:] = part
        yield begin, values


@cache
def _values(dtype: str) -> npt.NDArray[np.float32]:
    """Return the 256 values of a dtype of one byte."""
    exponent_bits, mantissa_bits, bias, special = FLOAT8[dtype]
    byte = np.arange(256)
    sign = np.where(byte & 0x80, -1.0, 1.0)
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = exponent > 0
    scale = np.exp2(np.where(normal, exponent, 1) - bias)
    values = sign * (normal + mantissa) * scale
    if special == "nan":
        values[(byte & 0x7F) == 0x7F] = np.nan
    elif special == "unsigned zero":
        values[0x80] = np.nan
    else:
        top = exponent == (1 << exponent_bits) - 1
        values[top] = np.where(mantissa[top] == 0, sign[top] * np.inf, np.nan)
    table: npt.NDArray[np.float32] = values.astype(np.float32)
    return table


def _round_to_bfloat16(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> None:
    """Write the upper halves of float32 values, rounded: add 0x7fff and the bit that will be last."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    out[:] = rounded
    nan = np.isnan(values)
    if nan.any():
        out[nan] = 0x7FC0
