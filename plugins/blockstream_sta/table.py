"""Windows by step, layer and head: the released table, a user's own, or one choice for all.

A table's file is safetensors: `windows` [n, 3] int32, in tiles; `choice` [steps, layers, heads] uint8,
indices of them; and in its metadata `canvas` and `tile` as "30x48x80".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockstream.errors import ConfigError
from blockstream.plugins import AttentionLayer, current_run
from blockstream.system import regular

from .tiles import Tiling, Window

RELEASED = "hunyuan_30x48x80.safetensors"


@dataclass(frozen=True)
class Uniform:
    """The same windows at every step but the first, which see everything."""

    windows: tuple[Window, ...]
    tile: Window
    dense_steps: int | float

    name = "the config's windows"

    def check(self, layer: AttentionLayer) -> None:
        """Raise ConfigError where the windows are not one, nor one a head."""
        if len(self.windows) not in (1, layer.heads):
            raise ConfigError(
                f"sta: {len(self.windows)} windows for {layer.name}, which has {layer.heads} heads; write "
                "one window, or one a head"
            )

    def at(self, layer: AttentionLayer) -> Sequence[Window] | None:
        """Return a window a head for the step of the run in progress, None where all see everything."""
        run = current_run()
        dense = self.dense_steps
        if isinstance(dense, float):
            if run.steps is None and dense:
                return None
            dense = round(dense * (run.steps or 0))
        if dense and (run.step is None or run.step < dense):
            return None
        return self.windows * (1 if len(self.windows) > 1 else layer.heads)


@dataclass(frozen=True)
class Table:
    """A table of `choice` [steps, layers, heads] among `windows`, for one canvas."""

    canvas: tuple[int, int, int]
    tile: Window
    windows: tuple[Window, ...]
    choice: Tensor
    name: str

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Table:
        """Return the table of a file. Raises ConfigError for one that is missing or is no table."""
        try:
            regular.check(path)
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                windows, choice = file.get_tensor("windows").tolist(), file.get_tensor("choice")
                canvas, tile = (_size(said[key]) for key in ("canvas", "tile"))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(
                f"sta table {path}: {type(error).__name__}: {error}; `blockstream sta search` writes tables"
            ) from error
        if choice.dim() != 3 or int(choice.max()) >= len(windows) or any(len(w) != 3 for w in windows):
            raise ConfigError(
                f"sta table {path}: choice {list(choice.shape)} of {len(windows)} windows is not a choice "
                "for each step, layer and head"
            )
        return cls(canvas, tile, tuple((t, h, w) for t, h, w in windows), choice, name or str(path))

    @classmethod
    def released(cls) -> Table:
        """Return FastVideo's table for HunyuanVideo at 117 frames of 768x1280."""
        with as_file(files(__package__).joinpath("data", RELEASED)) as path:
            return cls.read(path, "the released table")

    def write(self, path: Path) -> None:
        """Write the table. Raises ConfigError where the file cannot be written."""
        tensors = {"windows": torch.tensor(self.windows, dtype=torch.int32), "choice": self.choice}
        said = {"canvas": _written(self.canvas), "tile": _written(self.tile)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, str(path), said)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"sta table {path}: {error}") from error

    def check(self, layer: AttentionLayer) -> None:
        """Raise ConfigError for a layer that the table is not for."""
        _, layers, heads = self.choice.shape
        mine, its = (layer.grid, layer.layers, layer.heads), (self.canvas, layers, heads)
        if mine != its:
            raise ConfigError(
                f"sta: {self.name} is for {_described(*its)}; {layer.name} has {_described(*mine)}. Write "
                "windows: [3, 3, 3] with a tile, or search a table of this size with `blockstream sta search`"
            )

    def at(self, layer: AttentionLayer) -> Sequence[Window] | None:
        """Return a window a head for the step of the run in progress; None, where none is known, is all.

        A run of another number of steps takes the row at the same share of the way.
        """
        run = current_run()
        if run.step is None or run.steps is None:
            return None
        row = min(run.step * len(self.choice) // run.steps, len(self.choice) - 1)
        return [self.windows[n] for n in self.choice[row, layer.index].tolist()]

    def density(self, step: int) -> float:
        """Return the share of the pairs that all layers and heads together compute at a row."""
        tiling = Tiling(self.canvas, self.tile)
        share = torch.tensor([tiling.density(window) for window in self.windows], dtype=torch.float64)
        return float(share[self.choice[step].long()].mean())


def _size(text: str) -> tuple[int, int, int]:
    t, h, w = (int(n) for n in text.split("x"))
    return t, h, w


def _written(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def _described(canvas: tuple[int, int, int], layers: int, heads: int) -> str:
    return f"{_written(canvas)} tokens, {layers} layers of {heads} heads"
