"""The attention transform: which layers, which windows at which step, by which kernel."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blockstream.plugins import AttentionKernel, AttentionLayer, hookimpl

from .flex import Flex, usable
from .gathered import attend
from .options import Options
from .table import Table, Uniform
from .tiles import Tiling, Window

log = logging.getLogger(__name__)


class SlidingTiles:
    """Sliding tile attention in every layer of full attention over a grid.

    A layer whose tokens are merged is computed as it is without a plugin: a merged grid has no table, and is
    no canvas that the method was made for. Windows of the config's own are applied to it where tiles divide
    it.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.windows is not None:
            self.source: Uniform | Table = Uniform(options.windows, options.tile, options.dense_steps)
        elif options.table is not None:
            self.source = Table.read(Path(options.table))
        else:
            self.source = Table.released()
        self.calls: Counter[str] = Counter()
        self._flex: dict[Tiling, Flex] = {}
        self._canvases: dict[tuple[int, int, int], bool] = {}
        self._dense_merged: set[str] = set()

    @hookimpl
    def attention_kernel(self, layer: AttentionLayer) -> AttentionKernel | None:
        """Return the kernel of a layer of full attention, None for any other.

        Raises ConfigError for a layer that the table is not for, or windows that are neither one nor one a
        head.
        """
        if layer.kind != "full":
            return None
        tiling = Tiling(layer.grid, self.source.tile)
        if layer.merged and (isinstance(self.source, Table) or not tiling.exact):
            self._dense_merged.add(layer.name)
            return None
        self.source.check(layer)
        if layer.grid not in self._canvases and not tiling.exact:
            log.warning(
                "sta: tiles of %s do not divide a canvas of %s: those at the ends are cut short, exactly, "
                "but no model was published or measured with such a canvas",
                *(_shown(tiling.tile), _shown(tiling.canvas)),
            )
        self._canvases[layer.grid] = tiling.exact
        return TileKernel(self, layer, tiling)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, windows: list[Window], text: int
    ) -> Tensor:
        """Return the attention of the canvas and the text behind it: see `gathered.attend`."""
        chosen = self.options.kernel
        if chosen == "flex" or (chosen == "auto" and usable(q.device, tiling)):
            self.calls["flex"] += 1
            if tiling not in self._flex:
                self._flex[tiling] = Flex(tiling)
            return self._flex[tiling].attend(q, k, v, windows, text)
        self.calls["gathered"] += 1
        return attend(q, k, v, tiling, windows, text)

    def report(self) -> dict[str, Any]:
        """Return what was done, for report.json; `text` is for the terminal."""
        calls = {"dense": 0, **self.calls}
        text = f"{self.source.name}, tiles of {_shown(self.source.tile)}; calls: "
        text += ", ".join(f"{n} {how}" for how, n in calls.items())
        if self._dense_merged:
            text += f"; {len(self._dense_merged)} layers run dense while their tokens are merged"
        if cut := [_shown(grid) for grid, exact in self._canvases.items() if not exact]:
            text += f"; tiles cut short on {', '.join(cut)}, no published case"
        return {
            "text": text,
            "windows": self.source.name,
            "tile": list(self.source.tile),
            "canvases": [{"grid": list(g), "whole_tiles": exact} for g, exact in self._canvases.items()],
            "calls": calls,
            "merged_layers_run_dense": len(self._dense_merged),
        }


class TileKernel:
    """The kernel of one layer."""

    def __init__(self, transform: SlidingTiles, layer: AttentionLayer, tiling: Tiling) -> None:
        self._transform, self._layer, self._tiling = transform, layer, tiling

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayer) -> Tensor:
        """Return the attention of q, k, v [B, heads, N, D]; text before the grid is moved behind it."""
        windows = self._windows()
        if windows is None:
            self._transform.calls["dense"] += 1
            return scaled_dot_product_attention(q, k, v)
        lead = layout.leading
        if lead:
            q, k, v = (torch.cat((x[:, :, lead:], x[:, :, :lead]), 2) for x in (q, k, v))
        y = self._transform.attend(q, k, v, self._tiling, windows, layout.text_tokens)
        return torch.cat((y[:, :, -lead:], y[:, :, :-lead]), 2) if lead else y

    def density(self) -> float:
        """Return the share of the pairs of tokens that are computed at the step of the run in progress."""
        windows = self._windows()
        if windows is None:
            return 1.0
        return sum(_density(self._tiling, w, self._layer.text_tokens) for w in windows) / len(windows)

    def _windows(self) -> list[Window] | None:
        windows = self._transform.source.at(self._layer)
        return None if windows is None or all(map(self._tiling.covers, windows)) else list(windows)


def _shown(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


@cache
def _density(tiling: Tiling, window: Window, text: int) -> float:
    """Return the share of the pairs with the text's, which are all computed."""
    T, H, W = tiling.canvas
    video = T * H * W
    return (tiling.density(window) * video**2 + 2 * video * text + text**2) / (video + text) ** 2
