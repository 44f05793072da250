"""How straight the flow was, step by step: the paper's Figure 17, for any number of runs.

Where a pipeline names its samplings, as `unit 3, stage 1`, the first and the last unit have a panel each and
every stage a line; else a run has a panel and every prompt a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from blockstream.report.record import RunRecord, names_of
from blockstream.report.sampling import Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """One line: its name, and (index, cosine) of each step that has one."""

    name: str
    points: list[tuple[int, float]]


def panels_of(record: RunRecord, run: str) -> dict[str, list[Line]]:
    """Return the lines of each panel of one run, named `run`; samplings of one name are averaged."""
    named: dict[str, list[Steps]] = {}
    for steps in record.steps:
        named.setdefault(steps.name, []).append(steps)
    if set(named) <= {""}:
        lines = [Line(f"prompt {k}", _points([steps])) for k, steps in enumerate(record.steps)]
        shown = [line for line in lines if line.points]
        return {run: shown} if shown else {}
    groups: dict[str, list[Line]] = {}
    for name, steps_of_it in named.items():
        group, _, rest = name.partition(", ")
        if points := _points(steps_of_it):
            groups.setdefault(group, []).append(Line(rest or group, points))
    ends = list(dict.fromkeys([*list(groups)[:1], *list(groups)[-1:]]))
    return {f"{run}: {group}": groups[group] for group in ends}


def draw_straightness(records: Sequence[RunRecord]) -> Figure | None:
    """Return the panels of some runs side by side, None where no cosine was recorded."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    named = zip(records, names_of(records), strict=True)
    panels = {title: lines for record, name in named for title, lines in panels_of(record, name).items()}
    if not panels:
        return None
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(4.6 * len(panels), 3.6), facecolor="white", layout="constrained")
        lowest = min(c for lines in panels.values() for line in lines for _, c in line.points)
        for k, (title, lines) in enumerate(panels.items()):
            ax = figure.add_subplot(1, len(panels), k + 1)
            for line in lines:
                ax.plot(
                    *zip(*line.points, strict=True), label=line.name, linewidth=1.2, marker="o", markersize=3
                )
            ax.set_title(f"({chr(ord('a') + k)}) {title}", loc="left", fontsize=10)
            ax.set_xlabel("step", fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_ylim(lowest - 0.05 * (1 - lowest) - 1e-6, 1 + 0.05 * (1 - lowest) + 1e-6)
            if len(lines) <= 8:
                ax.legend(fontsize=7, frameon=False)
        figure.axes[0].set_ylabel("cosine of each velocity with the one before", fontsize=8)
    return figure


def _points(samplings: Sequence[Steps]) -> list[tuple[int, float]]:
    """Return the mean cosine at each index over samplings that have one."""
    at: dict[int, list[float]] = {}
    for steps in samplings:
        for i, cosine in zip(steps.indices, steps.cosine, strict=True):
            if cosine is not None:
                at.setdefault(i, []).append(cosine)
    return [(i, fmean(values)) for i, values in sorted(at.items())]
