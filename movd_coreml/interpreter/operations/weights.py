"""Compressed constants: each becomes the weights it stands for when its operation comes."""

from __future__ import annotations

import torch
from torch import Tensor

from blockstream.errors import ModelError

from .table import Int, Text, operator


@operator("constexpr_blockwise_shift_scale", moves=True)
def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return scale (data - offset), one scale for a block of numbers along each axis (iOS 18)."""
    wide = data.to(torch.float32, copy=True)
    if offset is not None:
        wide -= _spread(offset.float(), data.shape)
    return wide.mul_(_spread(scale.float(), data.shape)).to(scale.dtype)


@operator("constexpr_affine_dequantize", moves=True)
def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Int) -> Tensor:
    """Return scale (data - zero point), one of each for the whole or for each place of an axis (iOS 16)."""
    shape = [1] * quantized_data.dim()
    shape[axis] = -1
    wide = quantized_data.float() - zero_point.float().reshape(shape if zero_point.dim() else [])
    return wide.mul_(scale.float().reshape(shape if scale.dim() else [])).to(scale.dtype)


@operator("constexpr_cast", moves=True)
def constexpr_cast(source_val: Tensor, output_dtype: Text) -> Tensor:
    """Return a constant in another precision (iOS 16)."""
    if output_dtype != "fp32":
        raise ModelError(f"constexpr_cast to {output_dtype!r} is not evaluated; it can be fp32")
    return source_val.float()


@operator("constexpr_lut_to_dense", moves=True)
def lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Int | None = None
) -> Tensor:
    """Return the numbers of a table that indices name, one table for a block along each axis.

    With `shape` (iOS 16) the indices are packed, `lut` has one table of 2^bits numbers.
    """
    if shape is not None:
        count, bits = int(shape.prod()), (len(lut) - 1).bit_length()
        return lut[unpack(indices, bits, count).long()].reshape([int(n) for n in shape.tolist()])
    if lut.shape[-1] != 1:
        raise ModelError("tables of vectors are not evaluated; palettise single numbers")
    tables = _spread(lut[..., 0].movedim(-1, 0), (lut.shape[-2], *indices.shape)).expand(-1, *indices.shape)
    return tables.gather(0, indices.long()[None])[0]


def unpack(data: Tensor, bits: int, count: int, signed: bool = False) -> Tensor:
    """Return the first `count` numbers of `bits` each, packed lowest bit first; int8 or uint8 [count]."""
    if 8 % bits == 0:
        mask = 2**bits - 1
        numbers = torch.stack([(data >> at) & mask for at in range(0, 8, bits)], 1).reshape(-1)[:count]
    else:
        bit = (data[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        rows = bit.reshape(-1)[: count * bits].reshape(count, bits)
        numbers = (rows * 2 ** torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    if not signed:
        return numbers
    whole = numbers.to(torch.int8)
    return torch.where(whole >= 2 ** (bits - 1), whole - 2**bits, whole)


def _spread(blocks: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return one value of `blocks` for each number of a tensor of that shape, blocks evenly long."""
    for axis, size in enumerate(shape):
        have = blocks.shape[axis]
        if have not in (1, size):
            if size % have:
                raise ModelError(f"{have} blocks do not divide the {size} places of axis {axis}")
            blocks = blocks.repeat_interleave(size // have, axis)
    return blocks
