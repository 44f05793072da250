"""Names of dtypes, as safetensors writes them, and torch's own."""

from __future__ import annotations

import torch

from blockstream.checkpoint.read.convert import FLOAT8
from blockstream.errors import ConfigError

_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
}
#: Dtypes of files that a weight may have.
FLOATING = frozenset({"F64", "F32", "F16", "BF16", *FLOAT8})
#: Those that networks compute in.
COMPUTED = frozenset({"F32", "F16", "BF16"})
_ALIASES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16", "float": "F32"}

TO_TORCH: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _TORCH.items() if hasattr(torch, v)}
FROM_TORCH: dict[torch.dtype, str] = {v: k for k, v in TO_TORCH.items()}


def to_torch(name: str) -> torch.dtype:
    """Return torch's dtype of a safetensors name; ConfigError for one this torch lacks."""
    try:
        return TO_TORCH[name]
    except KeyError:
        raise ConfigError(f"dtype {name!r} is unknown to torch {torch.__version__}") from None


def parse_dtype(value: str | torch.dtype | None) -> str | None:
    """Return the safetensors name of what a user calls a dtype; None stays None.

    "bf16", "bfloat16", "BF16", "torch.bfloat16" and torch.bfloat16 are the same. Raises ConfigError
    naming the floating dtypes for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        name = FROM_TORCH.get(value) if isinstance(value, torch.dtype) else None
    else:
        text = value.removeprefix("torch.")
        known = {**{v: k for k, v in _TORCH.items()}, **_ALIASES}
        name = known.get(text.lower(), text.upper())
    if name not in ("F32", "F16", "BF16"):
        raise ConfigError(f"dtype {value!r}: write float32, float16 or bfloat16, or nothing for the file's")
    return name
