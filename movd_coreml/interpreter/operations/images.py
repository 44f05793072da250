"""Operations on planes [B, C, H, W]: resampling, pooling, moving between channels and places."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from blockstream.errors import ModelError

from .table import Flag, Int, Ints, Number, Text, operator


@operator("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: Int) -> Tensor:
    """Return [B, C, rH, rW] of [B, r r C, H, W]."""
    return functional.pixel_shuffle(x, upscale_factor)


@operator("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: Int) -> Tensor:
    """Return [B, r r C, H, W] of [B, C, rH, rW]."""
    return functional.pixel_unshuffle(x, downscale_factor)


@operator("depth_to_space", moves=True)
def depth_to_space(x: Tensor, block_size: Int) -> Tensor:
    """Return [B, C, rH, rW] of [B, r r C, H, W], the block's place the slower index of the channel."""
    b, c, h, w = x.shape
    x = x.reshape(b, block_size, block_size, c // block_size**2, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // block_size**2, h * block_size, w * block_size)


@operator("space_to_depth", moves=True)
def space_to_depth(x: Tensor, block_size: Int) -> Tensor:
    """Return [B, r r C, H, W] of [B, C, rH, rW], the block's place the slower index of the channel."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block_size, block_size, w // block_size, block_size)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(b, c * block_size**2, h // block_size, w // block_size)


@operator("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Number = 1.0, scale_factor_width: Number = 1.0
) -> Tensor:
    """Return x with each place repeated."""
    size = [int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)]
    return functional.interpolate(x, size, mode="nearest")


@operator("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Number = 1.0,
    scale_factor_width: Number = 1.0,
    align_corners: Flag = True,
) -> Tensor:
    """Return x interpolated between its places."""
    size = [int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)]
    return functional.interpolate(x, size, mode="bilinear", align_corners=align_corners)


@operator("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: Text = "valid",
    pad: Ints | None = None,
    ceil_mode: Flag = False,
) -> Tensor:
    """Return the largest number of each window."""
    x = functional.pad(x, _pool_pad(x, pad_type, pad, ceil_mode), value=float("-inf"))
    pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[x.dim() - 2]
    made: Tensor = pool(x, kernel_sizes, strides or [1] * (x.dim() - 2))
    return made


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: Text = "valid",
    pad: Ints | None = None,
    exclude_padding_from_average: Flag = False,
    ceil_mode: Flag = False,
) -> Tensor:
    """Return the mean of each window."""
    around = _pool_pad(x, pad_type, pad, ceil_mode)
    strides = strides or [1] * (x.dim() - 2)
    pool = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[x.dim() - 2]
    total: Tensor = pool(functional.pad(x, around), kernel_sizes, strides)
    if not exclude_padding_from_average or not any(around):
        return total
    share: Tensor = pool(functional.pad(torch.ones_like(x), around), kernel_sizes, strides)
    return total / share


def _pool_pad(x: Tensor, pad_type: str, pad: list[int] | None, ceil_mode: bool) -> list[int]:
    if ceil_mode or pad_type not in ("valid", "custom"):
        raise ModelError(f"pooling with pad_type {pad_type!r}, ceil_mode {ceil_mode} is not evaluated")
    n = x.dim() - 2
    pad = pad if pad is not None and pad_type == "custom" else [0] * (2 * n)
    return [side for i in reversed(range(n)) for side in pad[2 * i : 2 * i + 2]]
