"""Find which window each head loses least by: every candidate beside dense attention, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blockstream.errors import ConfigError
from blockstream.plugins import AttentionKernel, AttentionLayer, current_run, hookimpl

from .gathered import attend
from .options import SearchOptions
from .table import Table
from .tiles import Tiling, Window


def choose(losses: Tensor, dense_steps: int) -> Tensor:
    """Return the index of the candidate that each head loses least by, [steps, layers, heads] uint8.

    `losses` [prompts, candidates, steps, layers, heads]; the first `dense_steps` take the index after the
    last candidate, which stands for everything.
    """
    choice = losses.mean(0).argmin(0)
    choice[:dense_steps] = losses.shape[1]
    return choice.to(torch.uint8)


class WindowSearch:
    """Computes dense attention, and beside it what every candidate would have given.

    The run's result is that of dense attention. At its end the table is written.
    """

    def __init__(self, options: SearchOptions) -> None:
        self.options = options
        self._layer: AttentionLayer | None = None
        #: Sums over prompts of squared differences, and how many: (step, layer) -> [candidates, heads].
        self._losses: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[tuple[int, int], int] = {}
        self._steps = 0

    @hookimpl
    def run_started(self, run: Any) -> None:
        """Refuse a run that goes on: what was measured before it stopped is gone."""
        if run.resumed:
            raise ConfigError(f"{run.out}: a search cannot be resumed; begin again with --overwrite")

    @hookimpl
    def attention_kernel(self, layer: AttentionLayer) -> AttentionKernel | None:
        """Return the measuring kernel of a layer of full attention. Raises ConfigError for merged tokens."""
        if layer.kind != "full":
            return None
        if layer.merged:
            raise ConfigError(
                f"{layer.name}: windows are searched on all tokens; leave merging out of `attention`"
            )
        self._layer = self._layer or layer
        if (layer.grid, layer.heads) != (self._layer.grid, self._layer.heads):
            raise ConfigError(
                f"{layer.name} has {layer.heads} heads on {layer.grid}, {self._layer.name} "
                f"{self._layer.heads} on {self._layer.grid}: one table is for one canvas"
            )
        tiling = Tiling(layer.grid, self.options.tile)

        def measured(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayer) -> Tensor:
            if layout.leading:
                raise ConfigError(f"{layer.name}: windows are searched where the text stands behind the grid")
            dense = scaled_dot_product_attention(q, k, v)
            losses = [self._loss(q, k, v, dense, tiling, w, layout.trailing) for w in self.options.windows]
            self._note(layer.index, torch.stack(losses))
            return dense

        return measured

    @hookimpl
    def run_finished(self, run: Any, report: dict[str, Any]) -> None:
        """Write the table. Raises ConfigError where a step was not taken."""
        self.table().write(Path(self.options.table))

    def table(self) -> Table:
        """Return the table of what was measured."""
        layer, o = self._layer, self.options
        if layer is None or not self._losses:
            raise ConfigError(
                "sta search: this model has no full attention over a grid, so there are no windows"
            )
        missing = [
            s for s in range(self._steps) if any((s, n) not in self._losses for n in range(layer.layers))
        ]
        if missing:
            raise ConfigError(f"sta search: steps {missing} were not taken; search with sampler: euler")
        means = [
            torch.stack([self._losses[s, n] / self._seen[s, n] for n in range(layer.layers)], 1)
            for s in range(self._steps)
        ]
        dense = o.dense_steps if isinstance(o.dense_steps, int) else round(o.dense_steps * self._steps)
        choice = choose(torch.stack(means, 1)[None], dense)
        whole = Tiling(layer.grid, o.tile).tiles
        return Table(layer.grid, o.tile, (*o.windows, whole), choice.contiguous(), o.table)

    def _loss(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, tiling: Tiling, window: Window, text: int
    ) -> Tensor:
        """Return the mean squared difference of each head [heads], before the layer's output projection."""
        windows: Sequence[Window] = [window] * q.shape[1]
        return (attend(q, k, v, tiling, windows, text) - dense).float().square().mean((0, 2, 3)).cpu()

    def _note(self, layer: int, losses: Tensor) -> None:
        run = current_run()
        if run.step is None or run.steps is None:
            raise ConfigError("sta search: this pipeline states no step, so there is no table of steps")
        key, self._steps = (run.step, layer), run.steps
        self._losses[key] = self._losses.get(key, 0) + losses
        self._seen[key] = self._seen.get(key, 0) + 1
