"""Tables for the terminal: grids of text, lines of facts, and what `verify` found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockstream.budget.amounts import format_nbytes
from blockstream.verify.difference import Difference


def grid(rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first row is its head; the first column is left, the others right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="right" if k else "left", no_wrap=True)
    for row in rows[1:]:
        # Text, not markup: names come from files and are shown as they are.
        table.add_row(*(Text(cell) for cell in row))
    return table


def lines(rows: Iterable[tuple[str, str, bool]]) -> Table:
    """Return (what, text, whether it is bad) as lines; what wraps stays in its column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, text, bad in rows:
        table.add_row(Text(what), Text(text, style="bold red" if bad else ""))
    return table


def print_verify(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `verify --json` holds: how each stage was compared, and the first difference."""
    console = console or Console()
    how = {"whole": "whole", "segments": "segment by segment"}
    rows = [["stage", "weights", "forwards", "visits", "compared"]]
    for s in report["stages"]:
        rows.append(
            [s["name"], format_nbytes(s["nbytes"]), str(s["forwards"]), str(s["visits"]), how[s["how"]]]
        )
    console.print(grid(rows))
    for stage in report["stages"]:
        if stage["weights_alone"]:
            names = ", ".join(stage["weights_alone"])
            said = f"{stage['name']}: inputs of {names} have no copy; weights alone compared"
            console.print(Text(said), soft_wrap=True)
    if made_up := [s["name"] for s in report["stages"] if s.get("synthetic")]:
        console.print(Text(f"synthetic weights: {', '.join(made_up)}; the result means nothing"))
    if report["difference"] is None:
        console.print(Text("equal, bit for bit"))
    else:
        console.print(Text(f"different: {Difference(**report['difference'])}"), soft_wrap=True)
