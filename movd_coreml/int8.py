"""Weights in int8: what a quantised package must agree with, computed without coremltools."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from blockstream.checkpoint.write.rounding import MOST, Rounder

#: Weights of no more elements are left as they are.
LEAST_ELEMENTS = 512


def dequantised(weight: Tensor) -> Tensor:
    """Return what is left of a weight [out, in] once this project has rounded it, one scale a row."""
    rounder = Rounder("weight", "F32", (len(weight), weight[0].numel()))
    data = weight.contiguous().view(torch.uint8).numpy().data.cast("B")
    held = torch.frombuffer(rounder.round(data), dtype=torch.int8).view(weight.shape)
    return held * torch.from_numpy(rounder.scales)[:, None]


def dequantised_half(weight: Tensor) -> Tensor:
    """Return the same for a package in half precision: scales and quotients are rounded to it as well."""
    half = weight.half().numpy()
    scale = 2 * np.abs(half).max(1, keepdims=True) / np.float16(2 * MOST)
    held = np.round(half / np.where(scale == 0, np.float16(1), scale)).clip(-MOST, MOST)
    return torch.from_numpy(held.astype(np.float32) * scale.astype(np.float32)).half().float()


def is_quantised(network: nn.Module, path: str) -> bool:
    """Return whether a parameter is one that an int8 package holds quantised: a product's weight."""
    owner, _, name = path.rpartition(".")
    module = network.get_submodule(owner)
    return name == "weight" and isinstance(module, nn.Linear) and module.weight.numel() > LEAST_ELEMENTS
