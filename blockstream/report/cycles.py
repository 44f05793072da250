"""Loading and inference, block by block, of several runs on one scale: the paper's Figures 10, 11, 13 and 14.

A panel a run. Red is loading, black is executing; where a device is streamed to, the copies over the link
stand between. What stays in memory is underlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockstream.errors import ConfigError
from blockstream.report.bars import Bar
from blockstream.report.record import RunRecord, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The lanes from above: thread, kind, colour, name.
LANES = (
    ("loader", "load", "#d62f3a", "load"),
    ("link", "copy", "#e8833a", "copy"),
    ("compute", "execute", "#17171c", "execute"),
)
STALL, KEPT, QUIET = "#f5b83d", "#0f8b8d", "#8a8a94"


def stages_of(records: Sequence[RunRecord]) -> list[str]:
    """Return the stages that every run has computed, in the order of the first."""
    return [name for name in records[0].stages if all(r.of(name, "execute") for r in records)]


def draw_cycles(records: Sequence[RunRecord], stage: str, visits: int = 12) -> Figure:
    """Return the first `visits` visits of a pass of one stage in each run, as a figure no display knows of.

    The pass is the second, in which all is as it will be, or the only one. Raises ConfigError for a run that
    has not computed the stage.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [_panel(record, stage, visits) for record in records]
    longest = max(end - begin for _, begin, end, _ in panels)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(12, 0.5 + 1.5 * len(records)), facecolor="white", layout="constrained")
        for k, (name, (bars, begin, end, blocks)) in enumerate(zip(names_of(records), panels, strict=True)):
            ax = figure.add_subplot(len(records), 1, k + 1)
            _draw(ax, bars, begin, end, longest)
            title = f"({chr(ord('a') + k)}) {name}: {stage}, {end - begin:.3g} s for {blocks} blocks"
            ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("seconds", fontsize=8, color=QUIET)
    return figure


def _panel(record: RunRecord, stage: str, visits: int) -> tuple[list[Bar], float, float, int]:
    """Return the bars of a stretch of a run, when it begins and ends, and how many blocks it has."""
    executed = record.of(stage, "execute")
    passes = sorted({b.pass_index for b in executed})
    if not passes:
        raise ConfigError(f"{record.folder} has not computed {stage}; it has {', '.join(record.stages)}")
    shown = [b for b in executed if b.pass_index == passes[min(1, len(passes) - 1)]][:visits]
    stalls = [b for b in record.of(stage, "stall") if b.pass_index == shown[0].pass_index]
    begin = min([shown[0].start_s, *(b.start_s for b in stalls if b.end_s <= shown[0].start_s)])
    if len(passes) == 1:  # nothing was read ahead of it: the first loads belong to the picture
        begin = min([begin, *(b.start_s for b in record.of(stage, "load"))])
    end = shown[-1].end_s
    kinds = {kind for _, kind, _, _ in LANES} | {"stall"}
    return (
        [b for b in record.bars if b.kind in kinds and b.end_s > begin and b.start_s < end],
        begin,
        end,
        len(shown),
    )


def _draw(ax: Axes, bars: Sequence[Bar], begin: float, end: float, longest: float) -> None:
    lanes = [lane for lane in LANES if any((b.thread, b.kind) == lane[:2] for b in bars)]
    for row, (thread, kind, colour, _) in enumerate(reversed(lanes)):
        mine = [b for b in bars if (b.thread, b.kind) == (thread, kind)]
        where = [(max(b.start_s, begin) - begin, min(b.end_s, end) - max(b.start_s, begin)) for b in mine]
        ax.broken_barh(where, (row + 0.1, 0.8), facecolor=colour, edgecolor="white", linewidth=0.6)
        kept = [w for w, b in zip(where, mine, strict=True) if b.retained]
        ax.broken_barh(kept, (row + 0.02, 0.06), facecolor=KEPT)
        for bar, (x, width) in zip(mine, where, strict=True):
            if width > 0.018 * longest:
                ax.text(
                    x + width / 2,
                    row + 0.5,
                    _number(bar),
                    color="white",
                    fontsize=7,
                    ha="center",
                    va="center",
                )
    stalls = [
        (max(b.start_s, begin) - begin, min(b.end_s, end) - max(b.start_s, begin))
        for b in bars
        if b.kind == "stall"
    ]
    ax.broken_barh(stalls, (0.35, 0.3), facecolor=STALL)
    ax.set_ylim(-0.05, len(lanes) + 0.05)
    ax.set_xlim(0, longest)
    ax.set_yticks([row + 0.5 for row in range(len(lanes))], [name for *_, name in reversed(lanes)])
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0, labelsize=8, colors="#55555f")


def _number(bar: Bar) -> str:
    """Return the last number in a block's name."""
    digits = "".join(c if c.isdigit() else " " for c in bar.label).split()
    return digits[-1] if digits else ""
