"""Products of matrices: linear layers, attention, convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from blockstream.errors import ModelError

from .table import Flag, Int, Ints, Tensors, Text, operator

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias."""
    return functional.linear(x, weight, bias)


@operator("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: Flag = False, transpose_y: Flag = False) -> Tensor:
    """Return the product of the last two axes."""
    return torch.matmul(x.transpose(-1, -2) if transpose_x else x, y.transpose(-1, -2) if transpose_y else y)


@operator("einsum")
def einsum(values: Tensors, equation: Text) -> Tensor:
    """Return Einstein's sum."""
    return torch.einsum(equation, *values)


@operator("scaled_dot_product_attention")
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + mask) v; a mask of booleans keeps where True."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: Text = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: Int = 1,
) -> Tensor:
    """Return the convolution of x [B, C, ...] in one, two or three dimensions."""
    n = x.dim() - 2
    strides, dilations = strides or [1] * n, dilations or [1] * n
    if pad_type == "same":
        pairs = [_same(x.shape[2 + i], weight.shape[2 + i], strides[i], dilations[i]) for i in range(n)]
    elif pad_type == "same_lower":
        pairs = [_same(x.shape[2 + i], weight.shape[2 + i], strides[i], dilations[i])[::-1] for i in range(n)]
    else:
        pairs = _given_pad(pad_type, pad, n)
    before = [p for pair in reversed(pairs) for p in pair]
    return _CONV[n](functional.pad(x, before), weight, bias, strides, 0, dilations, groups)


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: Text = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: Int = 1,
) -> Tensor:
    """Return the transposed convolution of x [B, C, ...]: a full one, its sides cut by the padding."""
    n = x.dim() - 2
    pairs = _given_pad(pad_type, pad, n)
    y = _CONV_TRANSPOSE[n](x, weight, bias, strides or [1] * n, 0, 0, groups, dilations or [1] * n)
    for i, (before, after) in enumerate(pairs):
        size = y.shape[2 + i] - before - after if output_shape is None else output_shape[-n:][i]
        missing = before + size - y.shape[2 + i]
        if missing > 0:  # what no input reaches is the bias alone
            edge = torch.zeros(()) if bias is None else bias.reshape(1, -1, *[1] * n)
            shape = list(y.shape)
            shape[2 + i] = missing
            y = torch.cat((y, edge.to(y).expand(shape)), 2 + i)
        y = y.narrow(2 + i, before, size)
    return y


def _given_pad(pad_type: str, pad: list[int] | None, n: int) -> list[tuple[int, int]]:
    if pad_type == "valid":
        return [(0, 0)] * n
    if pad_type == "custom":
        pad = pad or [0] * (2 * n)
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(n)]
    raise ModelError(f"pad_type {pad_type!r} is not evaluated here; export with explicit padding")


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the padding that leaves ceil(size / stride) results, the odd one behind."""
    total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
    return total // 2, total - total // 2
