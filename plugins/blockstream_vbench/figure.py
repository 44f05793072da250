"""The figure: a web for each category, a line for each folder, every score brought to 0..1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from blockstream.errors import ConfigError

from .dimensions import DIMENSIONS

Scores = Mapping[str, Mapping[str, float]]


def draw(named: Mapping[str, Scores], path: Path) -> None:
    """Draw the categories' scores of each folder, as the paper's Figure 12 compares them, to a file.

    A dimension that a folder lacks is left out of its web. Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the figure needs matplotlib: pip install 'blockstream-engine[vbench]'") from error
    categories = list(dict.fromkeys(c for scores in named.values() for c in scores))
    columns = min(4, len(categories))
    lines = math.ceil(len(categories) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines + 0.5), layout="constrained")
    for n, category in enumerate(categories):
        axes = figure.add_subplot(lines, columns, n + 1, projection="polar")
        axes.set_title(category, fontsize=10)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75], labels=[])
        present = [d for d in DIMENSIONS if any(d.name in s.get(category, {}) for s in named.values())]
        at = {d.name: 2 * math.pi * k / len(present) for k, d in enumerate(present)}
        axes.set_xticks(list(at.values()), labels=[d.short for d in present], fontsize=7)
        axes.tick_params(axis="x", pad=7)
        for name, scores in named.items():
            mine = [d for d in present if d.name in scores.get(category, {})]
            points = [(at[d.name], d.normalised(scores[category][d.name])) for d in mine]
            closed = [*points, *points[:1]]
            axes.plot(*zip(*closed, strict=True), label=name, linewidth=1.4, marker="o", markersize=3)
    if named:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    figure.savefig(path, dpi=150)
