"""The table and the figure of a race, from its cells alone."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

from benchmarks._results import path_of, table
from benchmarks.peers.cells import (
    AUTO,
    MAIN,
    MODELS,
    OTHERS,
    REFERENCE,
    RIVAL,
    Cell,
    Found,
    best_other,
    by_row,
    pass_s,
    steady,
    steady_s,
)
from benchmarks.peers.models import MODELS as NETWORKS
from benchmarks.peers.ways import OURS, WAYS

#: Ours is level with another that is no more than this much faster.
LEVEL = 1.03
HEAD = (
    "way",
    "s a pass",
    "trials",
    "first pass s",
    "ours is faster by",
    "peak held GiB",
    "page cache GiB",
    "read GB a pass",
    "overlap",
    "set-up s",
    "extra disk GB",
)
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b")


def facts_of(stdout: str) -> dict[str, Any]:
    """Return the facts that a contestant printed last."""
    return dict(json.loads(stdout.strip().splitlines()[-1]))


def cause(returncode: int, stderr: str) -> str:
    """Return in a line why a contestant failed."""
    if returncode in (-9, 137):
        return "killed: out of memory under its limit"
    raised = [line for line in stderr.splitlines() if _RAISED.match(line)]
    last = raised[-1] if raised else stderr.strip()[-200:] or f"exit {returncode}"
    return last if len(last) <= 200 else last[:200] + "..."


def line(facts: dict[str, Any]) -> str:
    """Return a run in a line."""
    if "failed" in facts:
        return str(facts["failed"])
    each = " ".join(f"{s:.2f}" for s in facts["passes_s"])
    return f"{steady_s(facts):.2f} s a pass ({each}), set-up {facts['setup_s']:.1f} s"


def overlap(facts: dict[str, Any], compute_s: float | None) -> float | None:
    """Return the part of a steady pass's reading that compute hid, at the speed the disk had just before."""
    read_s = steady(facts["read_nbytes"]) / facts["raw_bytes_per_s"]
    if compute_s is None or read_s < 0.05 * compute_s:
        return None
    return min(1.0, max(0.0, 1 - (steady_s(facts) - compute_s) / read_s))


def markdown(found: Found) -> str:
    """Return the tables, a model and budget each, and what came of them."""
    rows = by_row(found)
    parts = [
        "Every run is a process of its own in a control group of that size, cold. A pass is the median of a "
        "run's passes between its first and its last, over the trials; overlap is the part of its reading "
        "that compute hides, at the speed that a bare direct read had just before. Set-up is what comes "
        "before the first pass; a peer's own copy of the weights (extra disk) is part of it in the trial "
        "that made it. Weights are synthetic.",
        versions(found),
    ]
    for model in MODELS:
        compute = pass_s(rows.get(Cell(model, "unlimited", REFERENCE), []))
        parts.append(f"## {NETWORKS[model].title}")
        if compute:
            parts.append(f"With all weights in memory and nothing else a pass takes {compute:.2f} s.")
        for budget in (MAIN, *OTHERS):
            here = {w: rows[Cell(model, budget, w)] for w in WAYS if Cell(model, budget, w) in rows}
            if not here:
                continue
            mine = pass_s(here.get(AUTO, []))
            lines = [_row(way, trials, mine, compute) for way, trials in here.items()]
            parts += [f"### {budget}", table(HEAD, lines)]
            failed = [f"* {w}: {ts[0]['failed']}" for w, ts in here.items() if "failed" in ts[0]]
            notes = [f"* {w}: {n}" for w, ts in here.items() for n in _notes(ts[0])]
            parts += ["\n".join(failed + notes)] if failed or notes else []
            parts += [said] if (said := verdict(here, compute)) else []
        parts.append(same_bits(rows, model))
    return "\n\n".join(part for part in parts if part)


def _notes(facts: dict[str, Any]) -> list[str]:
    notes = [str(facts["note"])] if "note" in facts else []
    if "filled" in facts:
        notes.append(
            f"with as many blocks in memory as its limit has room for: {facts['filled']}; so with none"
        )
    if (
        "engine" in facts
        and facts["engine"].get("sync_loads", 0) > facts["engine"].get("prefetch_hits", 0) > 0
    ):
        notes.append("its prefetch gave up, and it loaded as needed")
    return notes


def _row(
    way: str, trials: list[dict[str, Any]], mine: float | None, compute: float | None
) -> tuple[Any, ...]:
    ran = [t for t in trials if "failed" not in t]
    if not ran:
        return (way, "could not run", *[""] * (len(HEAD) - 2))
    seconds = statistics.median(steady_s(t) for t in ran)
    hidden = [o for t in ran if (o := overlap(t, compute)) is not None]

    def middle(values: list[float], unit: float) -> float:
        return statistics.median(values) / unit

    return (
        way,
        f"{seconds:.2f}",
        " ".join(f"{steady_s(t):.2f}" for t in ran),
        f"{middle([t['passes_s'][0] for t in ran], 1):.2f}",
        f"{seconds / mine:.2f}x" if mine and way not in OURS else "",
        f"{max(t['peak_nbytes'] for t in ran) / 2**30:.2f}",
        f"{middle([t['page_cache_nbytes'] or 0 for t in ran], 2**30):.2f}",
        f"{middle([steady(t['read_nbytes']) for t in ran], 1e9):.2f}",
        f"{statistics.median(hidden):.2f}" if hidden else "",
        f"{max(t['setup_s'] for t in ran):.1f}",
        f"{max(t['disk_nbytes'] for t in ran) / 1e9:.1f}",
    )


def verdict(here: dict[str, list[dict[str, Any]]], compute_s: float | None = None) -> str:
    """Return how ours stands among the ways of one model and budget; beside compute where nothing is read."""
    mine = pass_s(here.get(AUTO, []))
    others = {w: s for w, ts in here.items() if w not in OURS and (s := pass_s(ts)) is not None}
    if mine is None or not others:
        return ""
    best = min(others, key=lambda w: others[w])
    ratio = others[best] / mine
    place = "first" if ratio >= 1 else "level" if ratio * LEVEL >= 1 else "NOT FIRST"
    against = f", {others[RIVAL] / mine:.2f}x as fast as accelerate" if RIVAL in others else ""
    if compute_s and all(steady(t["read_nbytes"]) == 0 for t in here[AUTO] if "failed" not in t):
        against += f", {compute_s / mine:.2f}x as fast as plain PyTorch with all weights in memory"
    return f"{AUTO} is {place}: {ratio:.2f}x as fast as the best other, {best}{against}."


def same_bits(rows: dict[Cell, list[dict[str, Any]]], model: str) -> str:
    """Return which ways gave other bits than the most."""
    digests: dict[str, set[str]] = {}
    for row, trials in rows.items():
        for t in trials:
            if row.model == model and "failed" not in t:
                digests.setdefault(t["digest"], set()).add(row.way)
    if not digests:
        return ""
    most = max(digests, key=lambda d: len(digests[d]))
    others = sorted({way for d, ways in digests.items() if d != most for way in ways})
    return f"Other bits than the rest: {', '.join(others)}." if others else "All that ran gave the same bits."


def versions(found: Found) -> str:
    """Return the versions of the contestants' environments, those of one line together."""
    kept: dict[str, set[str]] = {}
    for facts in found.values():
        for name, version in facts.get("versions", {}).items():
            kept.setdefault(name, set()).add(version)
    return "Versions: " + ", ".join(f"{n} {' and '.join(sorted(v))}" for n, v in sorted(kept.items())) + "."


def data(found: Found) -> dict[str, Any]:
    """Return what is written as JSON."""
    best = {model: best_other(found, model) for model in MODELS}
    return {"best_other": best, "cells": [{"cell": vars(c), **found[c]} for c in found]}


def draw(found: Found) -> str:
    """Draw the full column, a panel a model, and time over budget for the leaders; return the link to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = by_row(found)
    figure, axes = plt.subplots(2, len(MODELS), figsize=(4.2 * len(MODELS), 7.2), layout="constrained")
    for model, (top, below) in zip(MODELS, axes.T, strict=True):
        compute = pass_s(rows.get(Cell(model, "unlimited", REFERENCE), []))
        _bars(top, rows, model)
        _lines(below, rows, model, best_other(found, model))
        for axis, mark in ((top, top.axvline), (below, below.axhline)):
            if compute:
                mark(compute, color="0.4", linestyle=":", linewidth=1, label="compute alone")
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
        top.set_title(NETWORKS[model].title, fontsize=8)
        if below.get_legend_handles_labels()[0]:
            below.legend(fontsize=7)
    path = path_of("peers", ".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"![seconds a pass]({path.name})"


def _bars(axis: Any, rows: dict[Cell, list[dict[str, Any]]], model: str) -> None:
    ways = [w for w in WAYS if Cell(model, MAIN, w) in rows]
    for place, way in enumerate(ways):
        ran = [steady_s(t) for t in rows[Cell(model, MAIN, way)] if "failed" not in t]
        if not ran:
            axis.text(0, place, " could not run", va="center", fontsize=7, color="0.4")
            continue
        middle = statistics.median(ran)
        error = [[middle - min(ran)], [max(ran) - middle]]
        axis.barh(place, middle, xerr=error, color="#1f6f8b" if way in OURS else "#c8a27a")
    axis.set_yticks(range(len(ways)), ways, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds a pass at {MAIN}", fontsize=8)


def _lines(axis: Any, rows: dict[Cell, list[dict[str, Any]]], model: str, best: str | None) -> None:
    budgets = sorted((MAIN, *OTHERS), key=lambda b: float(b.removesuffix("GiB").replace("unlimited", "inf")))
    for way in (AUTO, RIVAL, best):
        times = [pass_s(rows.get(Cell(model, b, way), [])) if way else None for b in budgets]
        points = [(x, s) for x, s in enumerate(times) if s is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
    axis.set_xticks(range(len(budgets)), budgets, fontsize=7)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("seconds a pass", fontsize=8)
