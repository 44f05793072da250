"""Weights in int8 as this project rounds them: what a quantised package must agree with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockstream.checkpoint.int8 import Rounder

#: Weights of no more elements are left as they are.
LEAST_ELEMENTS = 512


def dequantised(weight: Tensor) -> Tensor:
    """Return what is left of a weight [out, in] once it was held in int8, one scale a row."""
    rounder = Rounder("weight", "F32", (len(weight), weight[0].numel()))
    data = weight.contiguous().view(torch.uint8).numpy().data.cast("B")
    held = torch.frombuffer(rounder.round(data), dtype=torch.int8).view(weight.shape)
    return held * torch.from_numpy(rounder.scales)[:, None]


def is_quantised(network: nn.Module, path: str) -> bool:
    """Return whether a parameter is one that an int8 package holds quantised: a product's weight."""
    owner, _, name = path.rpartition(".")
    module = network.get_submodule(owner)
    return name == "weight" and isinstance(module, nn.Linear) and module.weight.numel() > LEAST_ELEMENTS
