"""The arithmetic of VBench's dimensions on frames, features and flow that are given. No network.

Written after vbench 0.1.5, whose loops it equals; float64 throughout. `flicker` is the engine's own measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blockstream.report.measures import flicker

__all__ = [
    "aesthetic",
    "average",
    "consistency",
    "flicker",
    "flow_scores",
    "motion_limits",
    "moves",
    "smoothness",
]

Array = NDArray[np.float64]


def consistency(features: ArrayLike) -> tuple[float, int]:
    """Return the consistency of a video's features [frames, n], and over how many frames it was taken.

    Each frame but the first is compared with the one before it and with the first. Subject consistency is
    this of DINO's features, background consistency of CLIP's. Raises ValueError for fewer than two frames.
    """
    f = _unit(features)
    if len(f) < 2:
        raise ValueError(f"{len(f)} frames have no neighbours to compare")
    before = np.clip((f[1:] * f[:-1]).sum(1), 0, None)
    first = np.clip((f[1:] * f[:1]).sum(1), 0, None)
    return float(((before + first) / 2).mean()), len(f) - 1


def aesthetic(features: ArrayLike, weight: ArrayLike, bias: float) -> float:
    """Return the aesthetic quality of CLIP features [frames, n] by a linear head, weight [n] and bias."""
    rated = _unit(features) @ np.asarray(weight, np.float64).reshape(-1) + float(bias)
    return float((rated / 10).mean())


def flow_scores(flow: ArrayLike) -> Array:
    """Return, for each flow [pairs, 2, h, w] between frames, the mean of its largest twentieth."""
    f = np.asarray(flow, np.float64)
    size = np.sqrt((f**2).sum(1)).reshape(len(f), -1)
    largest = int(0.05 * size.shape[1])
    top: Array = np.sort(size, 1)[:, ::-1][:, :largest].mean(1)
    return top


def moves(scores: Sequence[float] | Array, frames: int, height: int, width: int) -> bool:
    """Return whether a video of so many frames at 8 fps moves, by the scores of its flows."""
    threshold, needed = motion_limits(frames, height, width)
    return int((np.asarray(scores) > threshold).sum()) >= needed


def motion_limits(frames: int, height: int, width: int) -> tuple[float, int]:
    """Return the size of flow that counts as motion, in pixels, and how many pairs have to have it."""
    return 6.0 * min(height, width) / 256.0, round(4 * frames / 16.0)


def smoothness(frames: NDArray[np.uint8], interpolated: NDArray[np.uint8]) -> float:
    """Return how near the odd frames [T, H, W, 3] are to those interpolated from the even ones."""
    both = zip(frames[1::2].astype(np.int16), interpolated[1::2].astype(np.int16), strict=False)
    errors = [float(np.abs(a - b).mean()) for a, b in both]
    if not errors:
        raise ValueError("fewer than two frames have no odd one to compare")
    return (255.0 - float(np.mean(errors))) / 255.0


def average(scores: Sequence[float], weights: Sequence[int] | None = None) -> float:
    """Return the mean over videos; consistency weighs each by its frames."""
    return float(np.average(scores, weights=weights))


def _unit(features: ArrayLike) -> Array:
    f = np.asarray(features, np.float64)
    unit: Array = f / np.linalg.norm(f, axis=1, keepdims=True)
    return unit
