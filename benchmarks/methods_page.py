"""The page and pictures of `benchmarks.methods`: what each way scored, paired by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def column(rows: Rows, way: str, key: str) -> np.ndarray:
    return np.array([row["ways"][way][key] for row in rows], dtype=float)


def progress(rows: Rows) -> str:
    """Return the score and passes of each way so far."""
    ways = rows[0]["ways"]
    shares = {w: (column(rows, w, "right").mean(), column(rows, w, "passes").mean()) for w in ways}
    return ", ".join(f"{w} {right:.3f} in {passes:.1f}" for w, (right, passes) in shares.items())


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean, prompts drawn with replacement."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def gates(rows: Rows) -> list[str]:
    """Return what the methods are held to, met or not."""
    ways, lines = rows[0]["ways"], []
    if "lpl + tdtm 25%" in ways:
        loss = column(rows, "baseline", "right").mean() - column(rows, "lpl + tdtm 25%", "right").mean()
        share = column(rows, "lpl + tdtm 25%", "passes").sum() / column(rows, "baseline", "passes").sum()
        met = "met" if loss <= 0.02 and share <= 0.55 else "NOT met"
        lines.append(
            f"LPL + TDTM, as they come, within 0.02 of the baseline at no more than 55% of the passes: {met} "
            f"({loss:+.3f} lost at {share:.1%})."
        )
    if "lpl leap 2" in ways:
        exact = set(column(rows, "lpl leap 2", "passes")) == {15.0}
        lines.append(f"`leap: 2` takes 15 passes: {'met' if exact else 'NOT met'}.")
    if {"lpl", "fewer steps", "fewer steps ab2"} <= set(ways):
        own, plain, second = (column(rows, w, "psnr_db") for w in ("lpl", "fewer steps", "fewer steps ab2"))
        lines.append(
            f"LPL, {np.median(own):.1f} dB, is nearer to the baseline than as many plain steps, "
            f"{np.median(plain):.1f} dB, for {np.mean(own > plain):.1%} of prompts; than as many of second "
            f"order, {np.median(second):.1f} dB, for {np.mean(own > second):.1%}."
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    rows, settings = result["rows"], result["settings"]
    base = column(rows, "baseline", "right")
    lines = [
        f"# LPL and TDTM on the embedded model, {result['date']}",
        "",
        f"    {result['command']}",
        "",
        f"{len(rows)} seeded prompts, half of them of combinations held out of training; {settings['steps']}",
        f"steps, guidance {settings['guidance']}. Right: the checker finds shape, colour, motion, speed and",
        "background. Difference: to the baseline, paired by seed, with its 95% bootstrap interval. PSNR and",
        "SSIM: median, to the baseline's video. Flicker: mean change between frames; extent: how far the",
        "shape moves; attention: seconds in its layers a pass: all three as a share of the baseline's (a",
        "dash: the way was added later, not beside its baseline).",
        "",
        "| way | passes | right | difference | won, lost | PSNR dB | SSIM | flicker | extent | attention |",
        "|---" * 10 + "|",
    ]
    for way in settings["ways"]:
        right, passes = column(rows, way, "right"), column(rows, way, "passes")
        low, high = interval(right - base)
        cells = [
            f"{passes.mean():.1f} ({passes.min():.0f} to {passes.max():.0f})",
            f"{right.mean():.3f}",
            f"{(right - base).mean():+.3f} ({low:+.3f} to {high:+.3f})",
            f"{int((right > base).sum())}, {int((right < base).sum())}",
            f"{np.median(column(rows, way, 'psnr_db')):.1f}",
            f"{np.median(column(rows, way, 'ssim')):.3f}",
            f"{share_of(rows, way, 'flicker'):.3f}",
            f"{share_of(rows, way, 'extent_px'):.3f}",
            attention_share(rows, way),
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", *(f"* {gate}" for gate in gates(rows)), "", "## Prompts whose verdict a way changed", ""]
    for way in settings["ways"][1:]:
        right = column(rows, way, "right")
        for word, chosen in (("won", right > base), ("lost", right < base)):
            changed = [rows[i]["prompt"] for i in np.flatnonzero(chosen)]
            if changed:
                lines.append(f"* {way}, {word}: {'; '.join(changed)}")
    lines += [
        "",
        f"Environment: {json.dumps(result['environment'])}; weights {json.dumps(result['weights'])}",
    ]
    return "\n".join(lines) + "\n"


def share_of(rows: Rows, way: str, key: str) -> float:
    return float(np.median(column(rows, way, key) / np.maximum(column(rows, "baseline", key), 1e-9)))


def attention_share(rows: Rows, way: str) -> str:
    """Return the seconds of attention a pass as a share of the baseline's; a dash where they ran apart."""
    if any(row["ways"][way]["attention_s"] is None for row in rows):
        return "–"

    def a_pass(name: str) -> np.ndarray:
        return column(rows, name, "attention_s") / column(rows, name, "passes")

    return f"{np.median(a_pass(way) / a_pass('baseline')):.2f}"


def write(out: Path, result: dict[str, Any]) -> None:
    page = markdown(result)
    out.with_suffix(".md").write_text(page)
    print(page)


def draw(out: Path, result: dict[str, Any], clips: dict[str, list[np.ndarray]], titles: list[str]) -> None:
    """Draw the straightness of the baseline's steps, and clips side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cosines = np.array([row["ways"]["baseline"]["cosine"] for row in result["rows"]])
    steps = np.arange(1, cosines.shape[1] + 1)
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    low, middle, high = np.quantile(cosines, [0.05, 0.5, 0.95], axis=0)
    axes.fill_between(steps, low, high, alpha=0.25, label="5% to 95% of prompts")
    axes.plot(steps, middle, label="median")
    axes.set(xlabel="step", ylabel="cosine to the velocity before", title="Straightness of the trajectory")
    axes.legend()
    figure.savefig(out.with_name(f"{out.stem}-straightness.png"), dpi=110)
    plt.close(figure)

    figure, grid = plt.subplots(
        len(clips), len(titles), figsize=(4.2 * len(titles), 0.85 * len(clips) + 0.4), layout="constrained"
    )
    for row, (way, shown) in zip(np.atleast_2d(grid), clips.items(), strict=True):
        for axes, clip, title in zip(row, shown, titles, strict=True):
            frames = clip[np.linspace(0, len(clip) - 1, 6).round().astype(int)]
            axes.imshow(np.concatenate(list(frames), axis=1))
            axes.set(xticks=[], yticks=[])
            if way == next(iter(clips)):
                axes.set_title(title, fontsize=8)
        row[0].set_ylabel(way, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(out.with_name(f"{out.stem}-sheet.png"), dpi=110)
    plt.close(figure)
