"""Weights in int8: one scale a row, zero at zero. What a quantised package must agree with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Weights of no more elements are left as they are.
LEAST_ELEMENTS = 512


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [out, in] and scale [out, 1] of a weight [out, in]: row by row, the largest becomes 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / torch.where(scale == 0, 1, scale)).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def dequantised(weight: Tensor) -> Tensor:
    """Return what is left of a weight once it was held in int8."""
    held, scale = quantise(weight)
    return held.float() * scale


def is_quantised(network: nn.Module, path: str) -> bool:
    """Return whether a parameter is one that an int8 package holds quantised: a product's weight."""
    owner, _, name = path.rpartition(".")
    module = network.get_submodule(owner)
    return name == "weight" and isinstance(module, nn.Linear) and module.weight.numel() > LEAST_ELEMENTS
