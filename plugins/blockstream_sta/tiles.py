"""The rule of sliding tile attention: which tiles of keys a tile of queries sees. Integers only.

A canvas of T x H x W tokens is cut into tiles; a window says how many tiles of keys a query's tile sees
along each axis. Rule: Fast Video Generation with Sliding Tile Attention (Zhang et al., 2025), as its
authors' kernels have it: the window is centred on the query's tile, and shifted inward where it would leave
the canvas. An even window is as wide as the next odd one; one that is as wide as the canvas, or wider, is
all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

#: Tiles along (t, h, w).
Window = tuple[int, int, int]


class Box(NamedTuple):
    """A range of tokens along each axis: [low, high)."""

    t: tuple[int, int]
    h: tuple[int, int]
    w: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Return how many tokens lie in it."""
        return math.prod(high - low for low, high in self)


@dataclass(frozen=True, slots=True)
class Tiling:
    """A canvas (T, H, W) in tokens, cut into tiles (t, h, w).

    Where a tile does not divide an axis, the last tile there is cut short: what would pad it is neither a
    query nor a key. No published model has such a canvas; `exact` says whether this one is free of them.
    """

    canvas: tuple[int, int, int]
    tile: tuple[int, int, int]

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Return the tiles along each axis, short ones included."""
        t, h, w = (-(-n // size) for n, size in zip(self.canvas, self.tile, strict=True))
        return t, h, w

    @property
    def exact(self) -> bool:
        """Return whether every tile is whole."""
        return all(n % size == 0 for n, size in zip(self.canvas, self.tile, strict=True))

    def order(self) -> list[int]:
        """Return the place in (t, h, w) order of each token in tile order: tiles, then tokens in each."""
        _, H, W = self.canvas
        return [
            (t * H + h) * W + w
            for box in map(self.box_of, product(*map(range, self.tiles)))
            for t, h, w in product(*(range(*axis) for axis in box))
        ]

    def box_of(self, tile: tuple[int, ...]) -> Box:
        """Return the tokens of one tile."""
        return self._box([(i, i + 1) for i in tile])

    def seen(self, window: Window, tile: tuple[int, ...]) -> Box:
        """Return the tokens that the queries of one tile see."""
        return self._box([_seen(k, n, i) for k, n, i in zip(window, self.tiles, tile, strict=True)])

    def covers(self, window: Window) -> bool:
        """Return whether a window is the whole canvas from every tile."""
        return all(width(k, n) == n for k, n in zip(window, self.tiles, strict=True))

    def regions(self, window: Window) -> Iterator[tuple[Box, Box]]:
        """Yield (queries, keys): the tiles that see the same keys, as one box, and what they see.

        Tiles near a border share the window that was shifted inward, so their boxes are wider than a tile.
        """
        axes = [_regions(k, n) for k, n in zip(window, self.tiles, strict=True)]
        for axis in product(*axes):
            yield self._box([queries for queries, _ in axis]), self._box([keys for _, keys in axis])

    def density(self, window: Window) -> float:
        """Return the share of all pairs of query and key that are computed."""
        pairs = sum(queries.tokens * keys.tokens for queries, keys in self.regions(window))
        return pairs / math.prod(self.canvas) ** 2

    def _box(self, tiles: list[tuple[int, int]]) -> Box:
        return Box(
            *(
                (low * size, min(high * size, n))
                for (low, high), size, n in zip(tiles, self.tile, self.canvas, strict=True)
            )
        )


def width(k: int, n: int) -> int:
    """Return how many of `n` tiles a window of `k` sees."""
    return min(k // 2 * 2 + 1, n)


def _seen(k: int, n: int, i: int) -> tuple[int, int]:
    """Return the tiles [low, high) of `n` that a query in tile `i` sees through a window of `k`."""
    wide = width(k, n)
    low = max(0, min(i - k // 2, n - wide))
    return low, low + wide


def _regions(k: int, n: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return (queries, keys) along one axis, neighbours that see the same keys taken together."""
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for i in range(n):
        keys = _seen(k, n, i)
        if found and found[-1][1] == keys:
            found[-1] = ((found[-1][0][0], i + 1), keys)
        else:
            found.append(((i, i + 1), keys))
    return found
