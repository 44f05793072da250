"""Sliding tile attention at full size, HunyuanVideo's 117 frames of 768 x 1280, by both kernels."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.parts import Context

if (plugins := str(Path(__file__).resolve().parents[2] / "plugins")) not in sys.path:
    sys.path.append(plugins)  # where the package is not installed

from blockstream_sta.flex import Flex, usable
from blockstream_sta.gathered import attend
from blockstream_sta.tiles import Tiling

#: Windows of the released table, and the one that its authors time.
WINDOWS = ((3, 3, 3), (5, 3, 3), (1, 6, 10))


def tiles(at: Context) -> dict[str, Any]:
    """Return the seconds of one attention by window and kernel, and how far the kernels are apart."""
    tiling = Tiling((4, 4, 8), (2, 2, 4)) if at.fake else Tiling((30, 48, 80), (6, 8, 8))
    text, heads, width = (8, 2, 16) if at.fake else (256, 24, 128)
    dtype = torch.float32 if at.fake else torch.bfloat16
    n = math.prod(tiling.canvas) + text
    random = torch.Generator(at.where).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, n, width, device=at.where, dtype=dtype, generator=random) for _ in range(3)
    )
    flex, found = Flex(tiling), dict[str, Any]()
    for window in WINDOWS:
        windows = [window] * heads
        ways = {"gathered": lambda w=windows: attend(q, k, v, tiling, w, text)}
        if usable(q.device, tiling):
            ways["flex"] = lambda w=windows: flex.attend(q, k, v, w, text)
        row: dict[str, Any] = {"density": tiling.density(window)}
        for name, act in ways.items():
            row[name] = {"first_s": at.timed(act)} | at.rounds(act, rounds=5, warm=1)
        if "flex" in ways:
            row["largest_difference"] = float((ways["flex"]() - ways["gathered"]()).abs().max())
        found["x".join(map(str, window))] = row
    return found
