"""Tables for the terminal: grids of text, lines of facts, and what `verify` found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from blockstream.budget.amounts import format_nbytes
from blockstream.system.terminal import visible
from blockstream.verify.difference import Difference


class Grid:
    """A table whose first row is its head; the first column is left, the others right.

    Where a terminal is too narrow for all columns, those that do not fit follow in a table below, beside the
    first column again; no cell is cut.
    """

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        # Text, not markup: names come from files and are shown as they are.
        self._rows = [[visible(cell) for cell in row] for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, in parts if need be."""
        widths = [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]
        gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= options.max_width else 1
        parts, used = [[0]], widths[0]
        for k in range(1, len(widths)):
            if used + gap + widths[k] > options.max_width and len(parts[-1]) > 1:
                parts.append([0])
                used = widths[0]
            parts[-1].append(k)
            used += gap + widths[k]
        for n, columns in enumerate(parts):
            if n:
                yield Text()
            yield self._table(columns, gap)

    def _table(self, columns: Sequence[int], gap: int) -> Table:
        padding = (0, 1) if gap == 2 else (0, 1, 0, 0)
        table = Table(box=None, pad_edge=False, padding=padding, header_style="bold")
        for k in columns:
            table.add_column(Text(self._rows[0][k]), justify="right" if k else "left", overflow="fold")
        for row in self._rows[1:]:
            table.add_row(*(Text(row[k]) for k in columns))
        return table


def grid(rows: Sequence[Sequence[str]]) -> Grid:
    """Return a table whose first row is its head."""
    return Grid(rows)


def lines(rows: Iterable[tuple[str, str, bool]]) -> Table:
    """Return (what, text, whether it is bad) as lines; what wraps stays in its column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, text, bad in rows:
        table.add_row(Text(visible(what)), Text(visible(text), style="bold red" if bad else ""))
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
    if report.get("unpromised"):
        said = f"torch promises no equal bits on {report['device']} for: {', '.join(report['unpromised'])}"
        console.print(Text(f"{said}; another run may differ there"), soft_wrap=True)
    if report["difference"] is None:
        console.print(Text("equal, bit for bit"))
    else:
        console.print(Text(f"different: {Difference(**report['difference'])}"), soft_wrap=True)
