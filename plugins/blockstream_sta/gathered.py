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
        some = [x[:, heads] for x in (q, k, v)]
        if window is None:
            out[:, heads] = scaled_dot_product_attention(*some)
        else:
            out[:, heads] = _windowed(*some, tiling, window, text)
    return out


def heads_by_window(tiling: Tiling, windows: Sequence[Window]) -> dict[Window | None, list[int]]:
    """Return the heads of each window; None stands for all that are the whole canvas."""
    groups: dict[Window | None, list[int]] = {}
    for head, window in enumerate(windows):
        groups.setdefault(None if tiling.covers(window) else window, []).append(head)
    return groups


def _windowed(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, window: Window, text: int) -> Tensor:
    """Return the attention of heads [B, h, N, D] that share a window."""
    video = q.shape[2] - text
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if text:
        out[:, :, video:] = scaled_dot_product_attention(q[:, :, video:], k, v)
    canvas = out[:, :, :video].unflatten(2, tiling.canvas)
    queries, keys, values = (x[:, :, :video].unflatten(2, tiling.canvas) for x in (q, k, v))
    behind = [x[:, :, video:] for x in (k, v)]
    for mine, seen in tiling.regions(window):
        here = (slice(None), slice(None), *(slice(*axis) for axis in mine))
        there = (slice(None), slice(None), *(slice(*axis) for axis in seen))
        some = [
            torch.cat((x[there].flatten(2, 4), words), 2) if text else x[there].flatten(2, 4)
            for x, words in zip((keys, values), behind, strict=True)
        ]
        y = scaled_dot_product_attention(queries[here].flatten(2, 4), *some)
        canvas[here] = y.unflatten(2, tuple(high - low for low, high in mine))
    return out
