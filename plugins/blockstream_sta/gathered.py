"""Sliding tile attention by gathered windows: no mask, no compiler, any device and any canvas.

Queries of tiles that see the same keys are computed together, on a copy of those keys. What is never seen is
never multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .tiles import Tiling, Window


def attend(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, windows: Sequence[Window], text: int) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v with each head's own window, [B, heads, N, D].

    q, k, v [B, heads, N, D]: the canvas in (t, h, w) order, then `text` tokens, which every query sees and
    which see everything. `windows` has one window a head; heads whose window is the whole canvas are computed
    as they would be without any.
    """
    groups = heads_by_window(tiling, windows)
    if len(groups) == 1 and None in groups:
        return scaled_dot_product_attention(q, k, v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for window, heads in groups.items():
        if window is None:
            out[:, heads] = scaled_dot_product_attention(*(x[:, heads] for x in (q, k, v)))
        else:
            _windowed(q, k, v, out, heads, tiling, window, text)
    return out


def heads_by_window(tiling: Tiling, windows: Sequence[Window]) -> dict[Window | None, list[int]]:
    """Return the heads of each window; None stands for all that are the whole canvas."""
    groups: dict[Window | None, list[int]] = {}
    for head, window in enumerate(windows):
        groups.setdefault(None if tiling.covers(window) else window, []).append(head)
    return groups


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: list[int], tiling: Tiling, window: Window, text: int
) -> None:
    """Write the attention of the heads that share a window. No more than one window of keys is copied."""
    video = q.shape[2] - text
    if text:
        out[:, heads, video:] = scaled_dot_product_attention(q[:, heads, video:], k[:, heads], v[:, heads])
    canvas, queries, keys, values = (x[:, :, :video].unflatten(2, tiling.canvas) for x in (out, q, k, v))
    words = [x[:, heads, video:] for x in (k, v)]
    for mine, seen in tiling.regions(window):
        here, there = ((slice(None), slice(None), *(slice(*axis) for axis in box)) for box in (mine, seen))
        some = [x[there][:, heads].flatten(2, 4) for x in (keys, values)]
        if text:
            some = [torch.cat(pair, 2) for pair in zip(some, words, strict=True)]
        y = scaled_dot_product_attention(queries[here][:, heads].flatten(2, 4), *some)
        canvas[here][:, heads] = y.unflatten(2, tuple(high - low for low, high in mine))
