"""Tables for the terminal: a plan, and a run's predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockstream.budget import format_nbytes
from blockstream.difference import Difference


def print_run(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what report.json holds: each stage predicted and measured, memory against its budget."""
    console = console or Console()
    columns = {
        "stage": _text("name"),
        "passes": _text("passes"),
        "retained": lambda s: f"{s['d']} of {s['b']}",
        "read": lambda s: format_nbytes(s["read_nbytes"]),
        "predicted": _seconds("predicted_s"),
        "measured": _seconds("wall_s"),
        "stalled": _seconds("stall_s"),
        "overlap": lambda s: _percent(s["overlap"]),
    }
    console.print(_table(report["stages"], columns))
    budget = report["budget"]
    peak = f"memory: peak {format_nbytes(budget['peak_nbytes'])}"
    if budget.get("nbytes") is not None:
        held = "held" if budget.get("held", True) else "EXCEEDED"
        peak += f" of a budget of {format_nbytes(budget['nbytes'])}, {held}"
    console.print(Text(peak))
    _print_synthetic(report, console)


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `plan --json` holds: what each stage retains, the times, the peak, the curve."""
    console = console or Console()
    columns = {
        "stage": _text("name"),
        "retained": lambda s: _retained(s["retained"]),
        "slots": _text("slots"),
        "predicted": _seconds("predicted_s"),
        "stalled": _seconds("stall_s"),
    }
    console.print(_table(plan["stages"], columns))
    total = sum(stage["predicted_s"] for stage in plan["stages"])
    peak = format_nbytes(plan["peak_nbytes"])
    console.print(Text(f"predicted: {total:.1f} s in all, peak {peak}"))
    if plan.get("curve"):
        curve = {
            "budget": lambda point: format_nbytes(point["budget_nbytes"]),
            "predicted": _seconds("predicted_s"),
        }
        console.print(_table(plan["curve"], curve))


def print_verify(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `verify --json` holds: how each stage was compared, and the first difference."""
    console = console or Console()
    how = {"whole": "whole", "segments": "segment by segment"}
    columns = {
        "stage": _text("name"),
        "weights": lambda s: format_nbytes(s["nbytes"]),
        "forwards": _text("forwards"),
        "visits": _text("visits"),
        "compared": lambda s: how[s["how"]],
    }
    console.print(_table(report["stages"], columns))
    for stage in report["stages"]:
        if stage["weights_alone"]:
            names = ", ".join(stage["weights_alone"])
            said = f"{stage['name']}: inputs of {names} have no copy; weights alone compared"
            console.print(Text(said), soft_wrap=True)
    _print_synthetic(report, console)
    if report["difference"] is None:
        console.print(Text("equal, bit for bit"))
    else:
        console.print(Text(f"different: {Difference(**report['difference'])}"), soft_wrap=True)


def _print_synthetic(report: Mapping[str, Any], console: Console) -> None:
    if made_up := [s["name"] for s in report["stages"] if s.get("synthetic")]:
        console.print(Text(f"synthetic weights: {', '.join(made_up)}; the result means nothing"))


def _table(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(columns):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        # Text, not markup: names come from files and are shown as they are.
        table.add_row(*(Text(cell(row)) for cell in columns.values()))
    return table


def _text(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[key])


def _seconds(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.2f} s"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"


def _retained(retained: int | Sequence[Any]) -> str:
    return str(retained if isinstance(retained, int) else len(retained))
