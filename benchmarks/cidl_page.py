"""The result of `benchmarks.cidl`: tables, one figure a mode, r against the size of a segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import path_of, summary, table, write
from benchmarks.cidl_modes import (
    MODES,
    TEXT_TOKENS,
    Outcome,
    Subject,
    arena_nbytes,
    equations_s,
    median_of,
)
from blockstream.budget.amounts import format_nbytes
from blockstream.plan import latency
from blockstream.report.record import read_run
from blockstream.report.timeline import EXECUTE, LOAD, QUIET, draw_timeline

#: What the paper measured on an iPhone 15 Pro, seconds.
PAPER = {
    "stdit3": "paper: 29 s to 23 s a pass, 1000 s to 750 s in all",
    "t5": "paper: 164 s to 137 s",
}
Found = Mapping[str, tuple[Subject, Mapping[str, Sequence[Outcome]]]]


def write_modes(found: Found, command: str, small: bool) -> Path:
    """Write the modes' result and their figures; return the page's path."""
    suite = "cidl-small" if small else "cidl"
    parts, data = [], {}
    for name, (subject, outcomes) in found.items():
        sequential = median_of(outcomes["sequential"])
        rows, rest = [], []
        for mode in (m for m in MODES if m in outcomes):
            rows.append(_row(outcomes[mode], sequential))
            figure = _draw(median_of(outcomes[mode]), subject, f"{suite}-{name}-{mode}")
            rest.append(f"![{name}, {mode}]({figure.name})")
        head = [
            "mode",
            "a pass",
            "Eq. 8/9, or the bound",
            "simulated",
            "saved",
            "d of b",
            "stalled",
            "trials",
        ]
        parts += [f"## {name}", _said(subject, sequential), table(head, rows), *rest]
        data[name] = {mode: _data(o, sequential) for mode, o in outcomes.items()}
    page = "\n\n".join([*parts, NOTES])
    title = "Concurrent inference and dynamic loading" + (" (small trial)" if small else "")
    return write(suite, command, title, page, {"subjects": data})


NOTES = """`a pass` is the wall time over the passes, the first with its cold start included, median of the
trials. Eq. 8 and Eq. 9 are computed with the l and e of the sequential run and alpha = 0, plus the time
outside the blocks; for spread and auto the bound max(b e, (b - d) l) stands instead. `simulated` is what the
engine's own scheduler predicts from the run's own l and e. Weights are synthetic."""


def _row(outcomes: Sequence[Outcome], sequential: Outcome) -> list[Any]:
    o = median_of(outcomes)
    n = len(o.pass_s)
    saved = 1 - o.wall_s / sequential.wall_s
    return [
        o.mode,
        f"{o.wall_s / n:.2f} s",
        f"{equations_s(o, sequential):.2f} s",
        f"{o.predicted_s / n:.2f} s",
        f"{saved:.0%}" if o is not sequential else "",
        f"{o.terms['d']} of {o.terms['b']}",
        f"{o.terms['stall_s'] / n:.2f} s",
        " ".join(f"{x.wall_s / n:.2f}" for x in outcomes),
    ]


def _said(subject: Subject, sequential: Outcome) -> str:
    t = sequential.terms
    what = f"{subject.tokens} tokens"
    if subject.name == "stdit3":
        what += f" a sample, two samples (guidance), {TEXT_TOKENS} text tokens"
    passes = f"{subject.passes} pass{'es' * (subject.passes > 1)}"
    l, e = t["l_s"], t["e_s"]
    return (
        f"{format_nbytes(subject.checkpoint.nbytes)} in float32, {passes}; {what}: l = {l * 1e3:.0f} ms, "
        f"e = {e * 1e3:.0f} ms, l/e = {l / e:.2f} in the sequential run. Two slots are "
        f"{format_nbytes(arena_nbytes(subject, 0.0))} with what is resident. {PAPER.get(subject.name, '')}."
    )


def _data(outcomes: Sequence[Outcome], sequential: Outcome) -> dict[str, Any]:
    o = median_of(outcomes)
    return {
        **summary([x.wall_s for x in outcomes]),
        "pass_s": [x.pass_s for x in outcomes],
        "equation_pass_s": equations_s(o, sequential),
        "simulated_s": o.predicted_s,
        "terms": o.terms,
    }


def _draw(outcome: Outcome, subject: Subject, name: str) -> Path:
    """Draw a run's timeline, as the paper's Figures 10, 11, 13 and 14, from its ledger."""
    folder = outcome.ledger.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "ledger.jsonl").write_bytes(outcome.ledger.read_bytes())
    record = read_run(folder)
    figure = draw_timeline(record)
    title, below = figure.texts[:2]
    title.set_text(f"{subject.name}, {outcome.mode}")
    below.set_text(f"{outcome.wall_s:.2f} s in all  \u00b7  simulated {outcome.predicted_s:.2f} s")
    path = path_of(name, ".png")
    figure.savefig(path, dpi=80)
    return path


def write_sizes(
    found: Mapping[float, tuple[Subject, Mapping[str, Sequence[Outcome]]]], command: str, small: bool
) -> Path:
    """Write Eq. 8's r against the size of a segment, with its figure."""
    rows, data = [], {}
    for size, (subject, outcomes) in found.items():
        s, c = (median_of(outcomes[mode]) for mode in ("sequential", "concurrent"))
        n = subject.passes
        b, l, e = (s.terms[k] for k in ("b", "l_s", "e_s"))
        r = (s.wall_s - c.wall_s) / n
        by_eq = latency.concurrent_saving_s(b, l, e)
        times = [f"{x:.2f} s" for x in (s.wall_s / n, c.wall_s / n, r, by_eq, by_eq - r)]
        one = [f"{x * 1e3:.0f} ms" for x in (l, e)]
        rows.append([f"{size:g}", str(b), *one, *times, format_nbytes(arena_nbytes(subject, 0.0))])
        data[f"{size:g}"] = {
            "b": b,
            "l_s": l,
            "e_s": e,
            "r_s": r,
            "r8_s": by_eq,
            "sequential": summary([x.wall_s / n for x in outcomes["sequential"]]),
            "concurrent": summary([x.wall_s / n for x in outcomes["concurrent"]]),
        }
    suite = "cidl-sizes-small" if small else "cidl-sizes"
    figure = _draw_sizes(data, suite)
    (subject, _) = next(iter(found.values()))
    head = [
        "blocks a segment",
        "b",
        "l",
        "e",
        "sequential",
        "concurrent",
        "r",
        "r by Eq. 8",
        "alpha",
        "two slots",
    ]
    page = "\n\n".join(
        [
            "Eq. 8 says that r stays nearly constant as b varies: larger segments are fewer, l and e grow.",
            f"A chain of blocks, {format_nbytes(subject.checkpoint.nbytes)} in float32, {subject.tokens} "
            "tokens, cut into segments of half a block to four, from one checkpoint. Seconds a pass.",
            table(head, rows),
            f"![r against the size of a segment]({figure.name})",
        ]
    )
    return write(suite, command, "Eq. 8's r against the size of a segment", page, {"sizes": data})


def _draw_sizes(data: Mapping[str, Mapping[str, Any]], suite: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    ax = figure.add_subplot()
    at = range(len(data))
    for name, colour in (("sequential", LOAD), ("concurrent", EXECUTE)):
        trials = [d[name] for d in data.values()]
        middle = [t["median"] for t in trials]
        low = [m - t["range"][0] for m, t in zip(middle, trials, strict=True)]
        high = [t["range"][1] - m for m, t in zip(middle, trials, strict=True)]
        ax.errorbar(
            at, middle, yerr=[low, high], marker="o", capsize=3, color=colour, label=f"{name}, a pass"
        )
    ax.plot(at, [d["r_s"] for d in data.values()], marker="s", color="#0f8b8d", label="r, measured")
    ax.plot(
        at, [d["r8_s"] for d in data.values()], linestyle="--", color=QUIET, label="r by Eq. 8, alpha = 0"
    )
    ax.set_xticks(list(at), [f"{size} blocks\nb = {d['b']}" for size, d in data.items()])
    ax.set_ylabel("seconds")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    path = path_of(suite, ".png")
    figure.savefig(path, dpi=110)
    return path
