"""A run on one screen of a terminal: predicted against measured, the equations' terms, memory, disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockstream.budget import format_nbytes

from .facts import (
    comparison_facts,
    equation_table,
    gbps,
    name_of,
    pass_table,
    secs,
    stage_table,
    stages_of,
)
from .record import RunRecord

#: Columns of the stages' table that a terminal has no room for.
_LEFT_OUT = ("GB/s", "execute", "outside")


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
    disk = report.get("disk") or {}
    if disk.get("read_bytes_per_s"):
        text = f"read {format_nbytes(disk['read_nbytes'])} at {gbps(disk['read_bytes_per_s'])}"
        if own := disk.get("disk_bytes_per_s"):
            text += f", {disk['read_bytes_per_s'] / own:.0%} of the {gbps(own)} this disk gives"
        yield "disk", text, False
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
        yield "weights", f"synthetic: {', '.join(made_up)}; the result means nothing", True
    if report.get("unplanned"):
        yield "order", f"{report['unplanned']} visits were in no plan and loaded on demand", True


def _memory_lines(budget: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    if "peak_nbytes" not in budget:
        return
    held = bool(budget.get("held", True))
    text = f"peak {format_nbytes(budget['peak_nbytes'])}"
    if budget.get("nbytes") is not None:
        text += f" of a budget of {format_nbytes(budget['nbytes'])}, {'held' if held else 'EXCEEDED'}"
    causes = [f"{format_nbytes(n)} {cause}" for cause, n in (budget.get("by_cause") or {}).items() if n]
    if causes:
        text += f": {', '.join(causes)}"
    yield "memory", text, not held
    if budget.get("peak_during"):
        yield "", f"at {secs(budget.get('peak_at_s'))}, {budget['peak_during']}", False


def _attention_lines(attention: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    merged, plain = attention.get("merged_pass_s"), attention.get("plain_pass_s")
    if not attention.get("merged_layers"):
        return
    passes = attention.get("merged_passes", 0)
    text = f"{attention['merged_layers']} layers merge tokens, in {passes} of "
    text += f"{passes + attention.get('plain_passes', 0)} passes"
    if merged and plain:
        text += f": a pass takes {secs(merged)} instead of {secs(plain)}"
    yield "attention", text, False


def _without(rows: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    if not rows:
        return []
    kept = [k for k, name in enumerate(rows[0]) if name not in names]
    return [[row[k] for k in kept] for row in rows]


def lines(rows: Iterable[tuple[str, str, bool]]) -> Table:
    """Return (what, text, whether it is bad) as lines; what wraps stays in its column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, text, bad in rows:
        table.add_row(Text(what), Text(text, style="bold red" if bad else ""))
    return table


def grid(rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first row is its head; the first column is left, the others right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="right" if k else "left", no_wrap=True)
    for row in rows[1:]:
        # Text, not markup: names come from files and are shown as they are.
        table.add_row(*(Text(cell) for cell in row))
    return table
