"""Work done in tiles that fade into one another: along time, and over a frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Along:
    """Tiles along one axis: each of `size`, `stride` apart, of what goes in.

    Of what comes out `blend` samples of a tile are faded into from the one before, and `kept` are kept.
    """

    size: int
    stride: int
    blend: int
    kept: int


@dataclass(frozen=True)
class Tiling:
    """How a clip is cut. None along an axis: whole; height and width are both cut, or neither.

    A tile in time has one latent more than `size`: the causal convolutions' first frame, of which the
    result is dropped in all but the first tile.
    """

    time: Along | None = None
    height: Along | None = None
    width: Along | None = None


def in_time(x: Tensor, tiles: Tiling, compute: Callable[[Tensor], Tensor], samples: int) -> Iterator[Tensor]:
    """Yield `samples` frames made of x [B, c, T, H, W], tile by tile, each faded into from the one before."""
    frames, time = x.shape[2], tiles.time
    if time is None or frames <= time.size:
        yield in_space(x, tiles, compute)
        return
    before: Tensor | None = None
    for start in _starts(frames, time):
        tile = in_space(x[:, :, start : start + time.size + 1], tiles, compute)
        kept = time.kept + 1 if before is None else time.kept
        if before is not None:
            tile = _faded(before, tile[:, :, 1:], time.blend, 2)
        before = tile
        clip = tile[:, :, : min(kept, samples)]
        samples -= clip.shape[2]
        yield clip


def in_space(x: Tensor, tiles: Tiling, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what x [B, c, T, H, W] becomes, cut along height and width where they exceed a tile.

    A tile is faded into from the one above, then from the one to the left, both as they were faded into.
    """
    height, width = x.shape[3:]
    down, across = tiles.height, tiles.width
    if down is None or across is None or (height <= down.size and width <= across.size):
        return compute(x)
    rows, above = [], list[Tensor]()
    for top in range(0, height, down.stride):
        row: list[Tensor] = []
        for j, left in enumerate(range(0, width, across.stride)):
            tile = compute(x[:, :, :, top : top + down.size, left : left + across.size])
            if above:
                tile = _faded(above[j], tile, down.blend, 3)
            if row:
                tile = _faded(row[-1], tile, across.blend, 4)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :, : down.kept, : across.kept] for tile in row], dim=4))
        above = row
    return torch.cat(rows, dim=3)


def count_tiles(frames: int, height: int, width: int, tiles: Tiling) -> int:
    """Return how many tiles [frames, height, width] are cut into."""
    time, down, across = tiles.time, tiles.height, tiles.width
    along_time = len(_starts(frames, time)) if time is not None and frames > time.size else 1
    if down is None or across is None or (height <= down.size and width <= across.size):
        return along_time
    return along_time * len(range(0, height, down.stride)) * len(range(0, width, across.stride))


def _starts(frames: int, time: Along) -> list[int]:
    """Return where the tiles begin; one that only repeats the frame before it makes no sample."""
    return [start for start in range(0, frames, time.stride) if start == 0 or frames - start > 1]


def _faded(before: Tensor, tile: Tensor, n: int, axis: int) -> Tensor:
    """Return a tile whose first `n` samples along an axis come from the last of the tile before, evenly."""
    n = min(before.shape[axis], tile.shape[axis], n)
    if n == 0:
        return tile
    shape = [1] * tile.dim()
    shape[axis] = n
    share = (torch.arange(n, dtype=torch.float64) / n).view(shape).to(tile.dtype)
    last = before.narrow(axis, before.shape[axis] - n, n)
    mixed = last * (1 - share) + tile.narrow(axis, 0, n) * share
    return torch.cat((mixed, tile.narrow(axis, n, tile.shape[axis] - n)), axis)
