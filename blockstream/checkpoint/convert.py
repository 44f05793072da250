"""Convert elements between dtypes as torch does, without torch: F32, F16, BF16 into one another.

bfloat16 is the upper half of a float32. Rounding is to nearest, ties to even; a NaN stays a NaN
(torch writes 0x7fc0 for it in bfloat16).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FLOATS = frozenset({"F32", "F16", "BF16"})
#: Elements converted at once: small enough that the temporaries stay in the cache.
STEP = 1 << 16


def can_convert(src: str, dst: str) -> bool:
    """Return whether elements of dtype `src` can be brought to `dst`."""
    return src == dst or (src in _FLOATS and dst in _FLOATS)


def convert(src: memoryview, src_dtype: str, dst: memoryview, dst_dtype: str) -> None:
    """Write the elements of `src` to `dst`, which has room for exactly as many. No overlap.

    Values beyond float16's range become infinities there, as in torch. Raises ValueError for a pair
    that cannot be converted.
    """
    if src_dtype == dst_dtype:
        dst[:] = src
        return
    if not can_convert(src_dtype, dst_dtype):
        raise ValueError(f"no conversion from {src_dtype} to {dst_dtype}")
    a, b = np.frombuffer(src, _bits(src_dtype)), np.frombuffer(dst, _bits(dst_dtype))
    with np.errstate(over="ignore"):
        for i in range(0, len(a), STEP):
            b[i : i + STEP] = _from_f32(_to_f32(a[i : i + STEP], src_dtype), dst_dtype)


def _bits(dtype: str) -> type[np.uint32] | type[np.uint16]:
    return np.uint32 if dtype == "F32" else np.uint16


def _to_f32(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint32]:
    """Return the bits as float32 bits; exact for all three dtypes."""
    if dtype == "F32":
        return bits.astype(np.uint32, copy=False)
    if dtype == "BF16":
        return bits.astype(np.uint32) << np.uint32(16)
    return bits.astype(np.uint16, copy=False).view(np.float16).astype(np.float32).view(np.uint32)


def _from_f32(bits: npt.NDArray[np.uint32], dtype: str) -> npt.NDArray[Any]:
    """Return float32 bits as those of `dtype`, rounded to nearest even."""
    if dtype == "F32":
        return bits
    if dtype == "F16":
        return bits.view(np.float32).astype(np.float16).view(np.uint16)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    upper = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    upper[(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)] = 0x7FC0
    return upper
