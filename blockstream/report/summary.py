"""A run on one screen of a terminal: predicted against measured, the equations' terms, memory, disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from blockstream.budget.amounts import format_nbytes

from .facts import (
    comparison_facts,
    device_text,
    energy_text,
    equation_table,
    gbps,
    name_of,
    pass_table,
    secs,
    stage_table,
    stages_of,
)
from .larger import a_year_text, larger_text
from .record import RunRecord
from .tables import grid, lines

#: Columns of the stages' table that a terminal has no room for, or that stand in the equations' table.
_LEFT_OUT = ("retained", "GB/s", "execute", "outside")


def print_run(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what report.json holds."""
    console = console or Console()
    stages = _without(stage_table(report), _LEFT_OUT)
    if stages:
        console.print(grid(stages))
        console.print()
    terms = equation_table(report)
    if any("alpha_s" in s for s in stages_of(report)):
        console.print(grid(terms))
        console.print()
    console.print(lines(_lines(report)))


def print_record(record: RunRecord, console: Console | None = None) -> None:
    """Print a run as its folder tells it, unfinished ones as far as they go."""
    console = console or Console()
    if record.report:
        print_run(record.report, console)
    else:
        console.print(grid(pass_table(record, most=40)))
        console.print()
        peak = max((s.nbytes for s in record.memory), default=0)
        rows = [("in all", secs(record.wall_s), False)]
        rows += [("memory", f"peak {format_nbytes(peak)}", False)] if peak else []
        console.print(lines(rows))
    console.print(lines([("", remark, False) for remark in record.remarks]))


def print_comparison(records: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print runs side by side."""
    console = console or Console()
    console.print(grid(comparison_facts(records)))
    console.print(lines([(r.name, remark, False) for r in records for remark in r.remarks]))


def _lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield (what, text, whether it is bad) of each line under the tables."""
    yield from _memory_lines(report.get("budget") or {})
    if device := report.get("device"):
        yield from _memory_lines(device["budget"], "device")
        yield "", device_text(report), False
    disk = report.get("disk") or {}
    if disk.get("read_bytes_per_s"):
        text = f"read {format_nbytes(disk['read_nbytes'])} at {gbps(disk['read_bytes_per_s'])}"
        if own := disk.get("disk_bytes_per_s"):
            text += f", {disk['read_bytes_per_s'] / own:.0%} of the {gbps(own)} this disk gives"
        if year := disk.get("a_year_nbytes"):
            text += f"; {a_year_text(year)}"
        yield "disk", text, False
    if energy := energy_text(report):
        yield "energy", energy, False
    if (larger := report.get("larger")) is not None:
        yield "more", larger_text(larger), False
    sampler = report.get("sampler")
    if isinstance(sampler, Mapping) and sampler.get("of"):
        leaps = [f"{a} to {b}" for run in sampler.get("runs") or () for a, b in run.get("leaps") or ()]
        text = f"{name_of(sampler)}: {sampler['passes']} of {sampler['of']} steps computed"
        if leaps:
            more = f" and {len(leaps) - 4} more" if len(leaps) > 4 else ""
            text += f", leapt {', '.join(leaps[:4])}{more}"
        yield "sampler", text, False
    yield from _attention_lines(report.get("attention") or {})
    if made_up := [str(s.get("name")) for s in stages_of(report) if s.get("synthetic")]:
        yield "", f"synthetic weights: {', '.join(made_up)}; the result means nothing", True
    if report.get("unplanned"):
        yield "order", f"{report['unplanned']} visits were in no plan and loaded on demand", True


def _memory_lines(budget: Mapping[str, Any], what: str = "memory") -> Iterator[tuple[str, str, bool]]:
    if "peak_nbytes" not in budget:
        return
    held = bool(budget.get("held", True))
    text = f"peak {format_nbytes(budget['peak_nbytes'])}"
    if budget.get("nbytes") is not None:
        said = "held" if held else "not watched" if budget.get("unwatched") else "EXCEEDED"
        text += f" of a budget of {format_nbytes(budget['nbytes'])}, {said}"
    causes = [f"{format_nbytes(n)} {cause}" for cause, n in (budget.get("by_cause") or {}).items() if n]
    if causes:
        text += f": {', '.join(causes)}"
    yield what, text, not held
    if budget.get("peak_during"):
        yield "", f"at {secs(budget.get('peak_at_s'))}, {budget['peak_during']}", False


def _attention_lines(attention: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    merged, plain = attention.get("merged_pass_s"), attention.get("plain_pass_s")
    kernels = attention.get("kernels") or {}
    if kernels.get("layers"):
        yield "attention", _kernels_text(kernels), False
    for name, said in (attention.get("said") or {}).items():
        if isinstance(said, Mapping) and said.get("text"):
            yield "", f"{name}: {said['text']}", False
    if not attention.get("merged_layers"):
        if attention.get("choices") and "kernels" in attention and not kernels.get("layers"):
            yield "attention", "no layer was changed in this run by what attention names", False
        return
    passes = attention.get("merged_passes", 0)
    text = f"{attention['merged_layers']} layers merge tokens, in {passes} of "
    text += f"{passes + attention.get('plain_passes', 0)} passes"
    if merged and plain:
        text += f": a pass takes {secs(merged)} instead of {secs(plain)}"
    yield "attention", text, False


def _kernels_text(kernels: Mapping[str, Any]) -> str:
    """Return what plugins' kernels came to in a line."""
    text = f"{kernels['layers']} layers are computed by a plugin's kernel, called {kernels['calls']} times"
    share = kernels.get("density")
    return text if share in (None, 1.0) else f"{text}: {share:.1%} of the pairs of tokens"


def _without(rows: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    if not rows:
        return []
    kept = [k for k, name in enumerate(rows[0]) if name not in names]
    return [[row[k] for k in kept] for row in rows]
