"""Measures of videos and pairs of videos that need no weights, a frame at a time: videos need not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: [H, W, 3].
Frame = NDArray[np.uint8]
Planes = NDArray[np.float64]


def psnr(a: Iterable[Frame], b: Iterable[Frame]) -> float:
    """Return the peak signal-to-noise ratio in dB of two videos of one shape; infinite where equal."""
    errors = [float(np.mean((x.astype(np.float64) - y) ** 2)) for x, y in zip(a, b, strict=True)]
    error = float(np.mean(errors))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Iterable[Frame], b: Iterable[Frame]) -> float:
    """Return the structural similarity of two videos of one shape: the mean over frames, places and colours.

    A Gaussian window of 11 pixels and deviation 1.5, as Wang et al. have it (Image Quality Assessment: From
    Error Visibility to Structural Similarity, 2004); narrower where a frame is.
    """
    return float(np.mean([_frame_ssim(x, y) for x, y in zip(a, b, strict=True)]))


def flicker(frames: Iterable[Frame]) -> float:
    """Return the temporal flickering of frames as VBench has it: 1 where neighbours are equal, 0 at worst.

    Raises ValueError for fewer than two frames.
    """
    errors, before = [], None
    for frame in frames:
        now = frame.astype(np.int16)
        if before is not None:
            errors.append(float(np.abs(now - before).mean()))
        before = now
    if not errors:
        raise ValueError("fewer than two frames have no neighbours to compare")
    return (255.0 - float(np.mean(errors))) / 255.0


def motion(frames: Iterable[Frame]) -> float | None:
    """Return the mean length of the optical flow between neighbours in pixels, by OpenCV (Farneback).

    None where OpenCV is not installed or there are fewer than two frames.
    """
    if find_spec("cv2") is None:
        return None
    cv2: Any = import_module("cv2")
    lengths = []
    for before, after in pairwise(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths.append(float(np.sqrt((flow.astype(np.float64) ** 2).sum(-1)).mean()))
    return float(np.mean(lengths)) if lengths else None


def cosine(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return the cosine of two arrays taken whole, None where one is zero or not finite."""
    x, y = (np.asarray(v, np.float64).reshape(-1) for v in (a, b))
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    value = float(x @ y) / length if length > 0 else math.nan
    return value if math.isfinite(value) else None


def _frame_ssim(a: Frame, b: Frame) -> float:
    size = min(11, *a.shape[:2])
    size -= 1 - size % 2
    at = np.arange(size) - size // 2
    window = np.exp(-(at**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blurred(x, window), _blurred(y, window)
    var_x = _blurred(x * x, window) - mean_x**2
    var_y = _blurred(y * y, window) - mean_y**2
    both = _blurred(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blurred(x: Planes, window: Planes) -> Planes:
    """Return x [H, W, 3] under a separable window, at places where it lies inside."""
    for axis in (0, 1):
        inside = x.shape[axis] - len(window) + 1
        x = sum(w * np.take(x, range(i, i + inside), axis) for i, w in enumerate(window))
    return x
