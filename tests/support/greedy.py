"""Sixteen blocks that take far more memory while they compute than their weights are."""

from __future__ import annotations

import time

import torch
from torch import nn


class Block(nn.Module):
    """A perceptron that takes 48 MiB for a while, in pieces of 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x):
        pieces = [torch.ones(1 << 18) for _ in range(48)]
        time.sleep(0.03)  # so that it is sampled
        return x + self.down(torch.relu(self.up(x))) * pieces[0][0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(16))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
