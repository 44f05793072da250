"""Operations that reduce or normalise along axes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .table import Compute, Flag, Int, Ints, Number, operator


def _axes(x: Tensor, axes: list[int] | None) -> list[int]:
    return list(range(x.dim())) if axes is None else axes


def _reduction(name: str, compute: Compute) -> None:
    def reduce(x: Tensor, axes: Ints | None = None, keep_dims: Flag = False) -> Tensor:
        result: Tensor = compute(x, _axes(x, axes), keep_dims)
        return result.to(x.dtype)

    operator(name)(reduce)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


for _name, _compute in {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_prod": _product,
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}.items():
    _reduction(_name, _compute)


@operator("reduce_argmax", moves=True)
def reduce_argmax(x: Tensor, axis: Int = -1, keep_dims: Flag = False) -> Tensor:
    """Return where the largest value is."""
    return x.argmax(axis, keepdim=keep_dims).int()


@operator("reduce_argmin", moves=True)
def reduce_argmin(x: Tensor, axis: Int = -1, keep_dims: Flag = False) -> Tensor:
    """Return where the smallest value is."""
    return x.argmin(axis, keepdim=keep_dims).int()


@operator("cumsum")
def cumsum(x: Tensor, axis: Int = 0, exclusive: Flag = False, reverse: Flag = False) -> Tensor:
    """Return the running sum along an axis, of what comes before each place where exclusive."""
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis).to(x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Number = 1e-5,
) -> Tensor:
    """Return x with mean 0 and variance 1 over its axes, then scaled and moved."""
    axes = sorted(a % x.dim() for a in _axes(x, axes))
    if axes == list(range(x.dim() - len(axes), x.dim())):
        return functional.layer_norm(x, x.shape[-len(axes) :], gamma, beta, epsilon)
    mean = x.mean(axes, keepdim=True)
    y = (x - mean) * torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@operator("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Number = 1e-5
) -> Tensor:
    """Return x [B, C, ...] with mean 0 and variance 1 over each channel, then scaled and moved."""
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    y = (x - mean) * torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    return _by_channel(y, gamma, beta)


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Number = 1e-5,
) -> Tensor:
    """Return x [B, C, ...] normalised by the mean and variance given."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean.reshape(shape)) * torch.rsqrt(variance.reshape(shape) + epsilon)
    return _by_channel(y, gamma, beta)


def _by_channel(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (y.dim() - 2))
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: Number = 1e-6) -> Tensor:
    """Return x divided by the root of the sum of its squares over the last three axes."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)
