"""Find the weights that have companions beside them: which names and shapes belong to which format.

As compressed-tensors, transformers (DeepSeek's fp8, gpt-oss), ComfyUI and bitsandbytes write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from blockstream.errors import CheckpointError

from .read.entries import Coded, TensorEntry, Tensors

_FP8 = ("F8_E4M3", "F8_E5M2")
#: What says how activations are rounded, or what is known from elsewhere: weights are widened without it.
_ACTIVATIONS = ("input_scale", "output_scale", "weight_shape", "k_scale", "v_scale", "scale_input")


#: bitsandbytes' own number for 1 / 127.
_OF_127 = 7.874015718698502e-3


def fp8_scaled(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield fp8 weights with `weight_scale`: of a tensor, a row, or a group of columns."""
    for entry, scale in _beside(tensors, _FP8, "_scale"):
        yield _scaled(tensors, entry, scale, via="scale")


def int8_scaled(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield int8 weights with `weight_scale` of compressed-tensors."""
    if tensors.method == "compressed-tensors":
        for entry, scale in _beside(tensors, ("I8",), "_scale"):
            yield _scaled(tensors, entry, scale, via="scale")


def fp8_blocks(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield fp8 weights with `weight_scale_inv`: one of 128 by 128 elements, or as the config says."""
    size = tensors.settings.get("weight_block_size") or (128, 128)
    for entry, scale in _beside(tensors, _FP8, "_scale_inv"):
        high, wide = size if len(scale.shape) >= 2 else entry.shape[-2:]
        grid = (-(-entry.shape[-2] // high), -(-entry.shape[-1] // wide))
        if len(scale.shape) >= 2 and tuple(scale.shape[-2:]) != grid:
            raise _wrong(entry, scale, f"{list(grid)}, one for {high} by {wide} elements")
        yield _coded(tensors, entry, {"scale": scale}, {"dtype": entry.dtype, "block": (high, wide)})


def comfy_fp8(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield ComfyUI's fp8 weights: `scale_weight` beside `weight`, one number."""
    for name, entry in tensors.entries.items():
        stem = name.removesuffix("weight")
        scale = tensors.entries.get(f"{stem}scale_weight")
        if entry.dtype in _FP8 and name.endswith("weight") and scale is not None:
            dropped = tuple(n for n in ("scaled_fp8", f"{stem}scale_input") if n in tensors.entries)
            coded = _scaled(tensors, entry, scale, via="F32")
            assert coded.coded is not None
            yield replace(coded, coded=replace(coded.coded, dropped=(*coded.coded.dropped, *dropped)))


def bitsandbytes_int8(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield int8 weights with `SCB` beside them: the largest of each row, for 127."""
    for name, entry in tensors.entries.items():
        stem = name.removesuffix("weight")
        scale = tensors.entries.get(f"{stem}SCB")
        if entry.dtype == "I8" and name.endswith("weight") and scale is not None:
            marker = f"{stem}weight_format"
            if marker in tensors.entries and any(tensors.read(tensors.entries[marker])):
                raise CheckpointError(
                    f"{entry.file.path}: {name!r} is int8 in an order of one device's own ({marker}); write "
                    "it again with a newer bitsandbytes"
                )
            if scale.shape != entry.shape[:1]:
                raise _wrong(entry, scale, f"{list(entry.shape[:1])}, one a row")
            about = {"dtype": "I8", "block": (1, entry.shape[-1]), "then": _OF_127}
            yield _coded(tensors, entry, {"scale": scale}, about, (marker,))


def bitsandbytes_4bit(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield weights in nf4 and fp4: two an element of U8, all about them in `quant_state` beside them."""
    for name, entry in tensors.entries.items():
        for kind in ("nf4", "fp4"):
            state = tensors.entries.get(f"{name}.quant_state.bitsandbytes__{kind}")
            if state is not None:
                yield _four_bit(tensors, entry, state)


def _four_bit(tensors: Tensors, entry: TensorEntry, state: TensorEntry) -> TensorEntry:
    try:
        said = json.loads(tensors.read(state))
        shape, size = tuple(map(int, said["shape"])), int(said["blocksize"])
        about = {"blocksize": size, "dtype": _DTYPES[said["dtype"]]}
        if "nested_blocksize" in said:
            about |= {k: said[k] for k in ("nested_blocksize", "nested_offset")}
        parts = ["absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if len(about) > 2 else ())]
        beside = {part: tensors.entries[f"{entry.name}.{part}"] for part in parts}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{state.file.path}: {state.name!r} does not say how {entry.name!r} is coded ({error!r}); fetch "
            "the file again"
        ) from error
    blocks = -(-prod(shape) // max(size, 1))
    if size < 2 or size % 2 or prod(shape) != 2 * entry.nbytes or beside["absmax"].shape != (blocks,):
        raise CheckpointError(
            f"{entry.file.path}: {entry.name!r} has {entry.nbytes} bytes and {beside['absmax'].shape} scales "
            f"for shape {list(shape)} in blocks of {size}; fetch the file again"
        )
    made = _coded(tensors, entry, beside, about, (state.name,))
    return replace(made, shape=shape)


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def mxfp4(tensors: Tensors) -> Iterator[TensorEntry]:
    """Yield gpt-oss's experts: NAME_blocks [experts, rows, blocks, 16], as [experts, columns, rows]."""
    for name, entry in tensors.entries.items():
        stem = name.removesuffix("_blocks")
        scale = tensors.entries.get(f"{stem}_scales")
        if stem == name or scale is None or entry.dtype != "U8":
            continue
        if len(entry.shape) != 4 or entry.shape[-1] != 16 or scale.shape != entry.shape[:3]:
            raise _wrong(entry, scale, f"{list(entry.shape[:3])}, one for 32 elements")
        experts, rows, blocks, _ = entry.shape
        made = _coded(tensors, entry, {"scale": scale}, {})
        yield replace(made, name=stem, shape=(experts, 32 * blocks, rows))


def _beside(
    tensors: Tensors, dtypes: tuple[str, ...], ending: str
) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """Yield the tensors of some dtypes that have another of their name and an ending, with it."""
    for name, entry in tensors.entries.items():
        scale = tensors.entries.get(name + ending)
        if entry.dtype in dtypes and scale is not None and len(entry.shape) >= 2:
            yield entry, scale


def _scaled(tensors: Tensors, entry: TensorEntry, scale: TensorEntry, via: str) -> TensorEntry:
    """Return a weight whose scales are one, one a row, or one a group of columns."""
    *rows, columns = entry.shape
    groups = scale.shape[-1] if list(scale.shape[:-1]) == rows else list(scale.shape) == rows
    if prod(scale.shape) == 1:
        block = (max(prod(rows), 1), columns)
    elif groups and columns % groups == 0:
        block = (1, columns // groups)
    else:
        raise _wrong(entry, scale, "one, one a row or one a group of columns")
    zero = entry.name + "_zero_point"
    if zero in tensors.entries and any(tensors.read(tensors.entries[zero])):
        raise CheckpointError(
            f"{entry.file.path}: {entry.name!r} has zero points that are not zero, which are not read; use "
            "the original checkpoint"
        )
    about = {"dtype": entry.dtype, "block": block, "via": via}
    return _coded(tensors, entry, {"scale": scale}, about, (zero,))


def _coded(
    tensors: Tensors,
    entry: TensorEntry,
    beside: Mapping[str, TensorEntry],
    about: Mapping[str, Any],
    dropped: tuple[str, ...] = (),
) -> TensorEntry:
    """Return a weight as coded; what its layer's activations are rounded by is dropped."""
    stem = entry.name.removesuffix("weight")
    gone = [n for n in (*dropped, *(stem + x for x in _ACTIVATIONS)) if n in tensors.entries]
    return replace(entry, coded=Coded(entry.name, beside, about, tuple(gone)))


def _wrong(entry: TensorEntry, scale: TensorEntry, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{scale.file.path}: {scale.name!r} has shape {list(scale.shape)} and {entry.name!r} of shape "
        f"{list(entry.shape)} needs {wanted}; is this the checkpoint of another model?"
    )
