"""timeline.png: what was loaded and computed when, after the paper's Figures 10, 11, 13 and 14.

Red is loading, black is executing. Above the whole run, below it each stage's first passes and its last,
then memory against the budget.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockstream.budget.amounts import format_nbytes
from blockstream.report.curve import seconds

from .bars import Bar
from .record import RunRecord
from .thin import thin_bars, thin_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOAD, EXECUTE, STALL, KEPT = "#d62f3a", "#17171c", "#f5b83d", "#0f8b8d"
COPY = "#e8833a"
QUIET, OUTSIDE = "#8a8a94", "#cfd1da"
LEGEND = (
    ("load", LOAD),
    ("copy", COPY),
    ("execute", EXECUTE),
    ("stall", STALL),
    ("outside", OUTSIDE),
    ("retained", KEPT),
)
#: What the host's compute thread does: over a device it only issues, and the device's own lane is drawn.
HOST = ("execute", "stall", "outside")
TINTS = ("#eef2fb", "#f4f0fa", "#eef7f2", "#fbf3ec")
#: Visits a panel shows at most: more are stripes.
VISITS = 72
#: Bars the strip of the whole run shows at most.
STRIP_BARS = 1500


def timeline_png(record: RunRecord) -> bytes:
    """Return the picture of a run as PNG."""
    figure = draw_timeline(record)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": "blockstream"})
    return buffer.getvalue()


def draw_timeline(record: RunRecord) -> Figure:
    """Return the picture of a run as a figure of its own, which no display knows of."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stages = [name for name in record.stages if record.of(name, "execute") or record.of(name, "load")]
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "axes.linewidth": 0.6}):
        heights = [1.1, *(1.15 for _ in stages), 1.5]
        figure = Figure(figsize=(13.5, 1.5 + 1.32 * sum(heights)), facecolor="white")
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        figure.subplots_adjust(
            left=0.075,
            right=0.985,
            hspace=0.62,
            bottom=0.55 / figure.get_figheight(),
            top=1 - 1.18 / figure.get_figheight(),
        )
        _title(figure, record)
        whole = figure.add_subplot(grid[0])
        _draw_whole(whole, record, stages)
        for k, name in enumerate(stages):
            _draw_stage(figure, grid[k + 1], record, name)
        _draw_memory(figure.add_subplot(grid[-1], sharex=whole), record, stages)
    return figure


def _title(figure: Figure, record: RunRecord) -> None:
    height = figure.get_figheight()
    figure.text(
        0.075, 1 - 0.34 / height, record.name, fontsize=15, fontweight="bold", color=EXECUTE, va="center"
    )
    figure.text(0.075, 1 - 0.62 / height, headline(record), fontsize=9.5, color="#55555f", va="center")
    x = 0.985
    for text, colour in reversed(LEGEND):
        width = 0.0062 * len(text)
        figure.text(x, 1 - 0.34 / height, text, color="#55555f", ha="right", va="center")
        figure.text(
            x - width, 1 - 0.34 / height, "\u25a0", color=colour, fontsize=11, ha="right", va="center"
        )
        x -= width + 0.024


def headline(record: RunRecord) -> str:
    """Return the run in a sentence."""
    said = [f"{seconds(record.wall_s)} in all"]
    predicted = [s.get("predicted_s") for s in record.report.get("stages", ())]
    known = [p for p in predicted if isinstance(p, int | float)]
    if known:
        measured = sum(s.get("wall_s", 0.0) for s in record.report["stages"])
        said.append(f"stages {seconds(measured)}, predicted {seconds(sum(known))}")
    peak = max((s.nbytes for s in record.memory), default=0)
    if peak:
        budget = record.budget_nbytes
        said.append(f"peak {format_nbytes(peak)}" + (f" of {format_nbytes(budget)}" if budget else ""))
    if not record.finished:
        said.insert(0, "unfinished")
    return "  \u00b7  ".join(said)


def _draw_whole(ax: Axes, record: RunRecord, stages: Sequence[str]) -> None:
    _shade(ax, record, stages, label=True)
    shown = [b for b in record.bars if b.kind in ("load", "copy", "compute", "wait", *HOST)]
    _lanes(ax, thin_bars(shown, STRIP_BARS), record.wall_s)
    ax.set_xlim(0, max(record.wall_s, 1e-6))
    ax.set_title("the whole run", loc="left", fontsize=9, color=QUIET, pad=14)
    ax.tick_params(labelbottom=True)
    ax.set_xlabel("seconds", fontsize=8, color=QUIET, labelpad=1)


def _draw_stage(figure: Figure, place: object, record: RunRecord, name: str) -> None:
    """Draw a stage's first passes, and beside them its last where it has more."""
    bars = record.of(name)
    passes = sorted({b.pass_index for b in bars if b.kind == "execute" and b.pass_index >= 0})
    if not passes:
        return
    visits = sum(b.kind == "execute" and b.pass_index == passes[0] for b in bars)
    head = passes[: max(1, min(len(passes), VISITS // max(1, visits), 4))]
    tail = [p for p in passes[-1:] if p not in head]
    others = [b for b in record.bars if b.stage != name and b.thread in ("compute", "loader")]
    widths = [len(head), 1] if tail else [1]
    inner = place.subgridspec(1, len(widths), width_ratios=widths, wspace=0.03)  # type: ignore[attr-defined]
    for k, shown in enumerate([head, tail][: len(widths)]):
        ax = figure.add_subplot(inner[k])
        _draw_passes(ax, bars, others, shown, labels=visits * len(shown) <= 40)
        if k == 0:
            ax.set_title(
                _stage_title(record, name, passes[-1] + 1), loc="left", fontsize=9, color=EXECUTE, pad=14
            )
        else:
            ax.set_yticks([])


def _stage_title(record: RunRecord, name: str, passes: int) -> str:
    stage = record.stages.get(name) or {}
    said = [name, f"{passes} {'passes' if passes > 1 else 'pass'}"]
    if stage:
        said += [f"{len(stage['retained'])} of {len(set(stage['order']))} segments retained"]
        said += [f"{stage.get('slots')} slots"]
    return "  \u00b7  ".join(said)


def _draw_passes(
    ax: Axes, bars: Sequence[Bar], others: Sequence[Bar], passes: Sequence[int], labels: bool
) -> None:
    """Draw some passes of a stage; what other stages did meanwhile is faint."""
    mine = [b for b in bars if b.pass_index in passes]
    computed = [b for b in mine if b.kind in ("execute", "stall")]
    begin, end = min(b.start_s for b in computed), max(b.end_s for b in computed)
    early = min([begin, *(b.start_s for b in mine if b.kind == "load")])
    begin = max(early, begin - 0.15 * (end - begin))
    # What was loaded meanwhile, for whichever pass: the overlap is what the figure is about.
    for shown, alpha in ((others, 0.3), (bars, 1.0)):
        _lanes(ax, [b for b in shown if b.end_s > begin and b.start_s < end], end - begin, alpha)
    for p in passes:
        first = min(b.start_s for b in computed if b.pass_index == p)
        if p != passes[0]:
            ax.axvline(first, color=QUIET, linewidth=0.7, linestyle=(0, (3, 3)))
        ax.text(
            max(first, begin), 2.16, f" pass {p + 1}", fontsize=7.5, color=QUIET, va="bottom", clip_on=False
        )
    if labels:
        _number(ax, [b for b in computed if b.kind == "execute"], end - begin)
    pad = 0.004 * (end - begin)
    ax.set_xlim(begin - pad, end + pad)


def _number(ax: Axes, visits: Sequence[Bar], width_s: float) -> None:
    for bar in visits:
        digits = "".join(c if c.isdigit() else " " for c in bar.label).split()
        if digits and bar.seconds > 0.012 * width_s:
            ax.text(
                (bar.start_s + bar.end_s) / 2,
                0.46,
                digits[-1],
                color="white",
                fontsize=7,
                ha="center",
                va="center",
            )


def _lanes(ax: Axes, bars: Sequence[Bar], width_s: float, alpha: float = 1.0) -> None:
    """Draw loads above, execution below; what is retained is underlined. `width_s`: the panel's length."""

    def draw(bars: Sequence[Bar], y: tuple[float, float], colour: str) -> None:
        # A white edge parts neighbours; on a sliver it would be all there is to see.
        edges = ["white" if b.seconds > 0.004 * width_s else colour for b in bars]
        where = [(b.start_s, b.seconds) for b in bars]
        ax.broken_barh(where, y, facecolor=colour, edgecolor=edges, linewidth=0.5, alpha=alpha)

    kinds = ("load", "copy", "execute", "stall", "outside", "compute", "wait")
    of = {kind: [b for b in bars if b.kind == kind] for kind in kinds}
    if of["compute"]:
        of |= {"execute": of["compute"], "stall": of["wait"]}
    draw(of["outside"], (0.32, 0.28), OUTSIDE)
    draw(of["stall"], (0.32, 0.28), STALL)
    draw(of["load"], (1.42, 0.5) if of["copy"] else (1.12, 0.8), LOAD)
    draw(of["copy"], (0.9, 0.46), COPY)
    draw(of["execute"], (0.06, 0.8), EXECUTE)
    for kind, y in (("load", (2.0, 0.1)), ("execute", (-0.2, 0.16))):
        kept = [(b.start_s, b.seconds) for b in of[kind] if b.retained]
        ax.broken_barh(kept, y, facecolor=KEPT, linewidth=0, alpha=alpha)
    ax.set_ylim(-0.28, 2.14)
    if of["copy"]:
        ax.set_yticks([1.67, 1.13, 0.46], ["load", "copy", "execute"])
    else:
        ax.set_yticks([1.52, 0.46], ["load", "execute"])
    _plain(ax)


def _draw_memory(ax: Axes, record: RunRecord, stages: Sequence[str]) -> None:
    _shade(ax, record, stages, label=False)
    samples = thin_samples(record.memory, 2000)
    budget, gib = record.budget_nbytes, 1 << 20
    unit = "MiB"
    most = max([s.nbytes for s in samples] or [0])
    if most >= 4 << 30:
        gib, unit = 1 << 30, "GiB"
    at = [s.at_s for s in samples]
    held = [s.nbytes / gib for s in samples]
    ax.fill_between(at, held, step="post", color="#c9ccd6", linewidth=0)
    ax.fill_between(
        at, [s.arena_nbytes / gib for s in samples], step="post", color=LOAD, alpha=0.55, linewidth=0
    )
    ax.step(at, held, where="post", color=EXECUTE, linewidth=0.9)
    top = 1.18 * most / gib or 1.0
    said = "held by the process; in red the weights"
    if budget and budget / gib <= 3 * top:
        top = max(top, 1.12 * budget / gib)
        ax.axhline(budget / gib, color=KEPT, linewidth=1.2, linestyle=(0, (5, 2)))
        ax.text(
            0.995 * max(record.wall_s, 1e-6),
            budget / gib,
            f"budget {format_nbytes(budget)}",
            color=KEPT,
            fontsize=8,
            ha="right",
            va="bottom",
        )
    elif budget:
        said += f"; the budget, {format_nbytes(budget)}, is far above"
    ax.set_ylim(0, top)
    ax.set_title(f"memory, {said}", loc="left", fontsize=9, color=QUIET, pad=4)
    ax.set_ylabel(unit, fontsize=8, color=QUIET)
    ax.set_xlabel("seconds", fontsize=8, color=QUIET, labelpad=1)
    _plain(ax)
    ax.tick_params(axis="y", length=2)


def _shade(ax: Axes, record: RunRecord, stages: Sequence[str], label: bool) -> None:
    for k, name in enumerate(stages):
        computed = [b for b in record.of(name) if b.kind in ("execute", "stall")]
        if not computed:
            continue
        begin, end = min(b.start_s for b in computed), max(b.end_s for b in computed)
        ax.axvspan(begin, end, color=TINTS[k % len(TINTS)], linewidth=0, zorder=0)
        if label and end - begin > 0.03 * record.wall_s:
            ax.text(
                (begin + end) / 2,
                2.2,
                name,
                fontsize=8.5,
                color=EXECUTE,
                ha="center",
                va="bottom",
                clip_on=False,
            )


def _plain(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#c9ccd6")
    ax.tick_params(length=0, labelsize=8, colors="#55555f")
    ax.tick_params(axis="x", length=3, color="#c9ccd6")
