"""A plan on the terminal: segments, what stays and why, times, memory by cause, the budget curve drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from blockstream.budget.amounts import format_nbytes
from blockstream.report.curve import seconds
from blockstream.report.forecast import in_words

from .items import REST, SETUP, beside_stages
from .larger import a_year_text, larger_text
from .tables import grid, lines

#: Columns of the longest bar of the curve.
BAR = 30


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `plan --json` holds."""
    console = console or Console()
    head = ["stage", "passes", "weights", "retained", "slots", "reads", "compute", "stalled", "time"]
    around = beside_stages(plan, "predicted_s")
    rows = [_row(s) for s in plan["stages"]]
    for name in (SETUP, REST):
        if name in around:
            rows.insert(0 if name == SETUP else len(rows), [name, *[""] * 7, seconds(around[name])])
    console.print(grid([head, *rows]))
    console.print()
    console.print(lines([*_reasons(plan["stages"]), *_sums(plan)]))
    if plan["curve"]:
        console.print()
        _print_curve(plan, console)


def _row(s: Mapping[str, Any]) -> list[str]:
    sure = {"exactly": "", "at most": "\u2264 ", "unknown": "~ "}[s["passes_are"]]
    return [
        s["name"],
        f"{sure}{s['passes']}",
        format_nbytes(s["nbytes"]),
        f"{len(s['retained'])} of {s['segments']}",
        str(s["slots"]),
        format_nbytes(s["read_nbytes"]),
        *(seconds(s[key]) for key in ("execute_s", "stall_s", "predicted_s")),
    ]


def _reasons(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, bool]]:
    """Yield lines that say what each stage is made of, what stays and where its costs come from."""
    for s in stages:
        yield s["name"], in_words(s["kinds"]), False
        yield "", f"stays: {_staying(s) or 'nothing'}", False
        if host := s.get("host"):
            below = f"{host['retained']} segments, {format_nbytes(host['retained_nbytes'])}"
            yield "", f"in host memory: {below}; copied {format_nbytes(s['copied_nbytes'])}", False
        if "experts" in s:
            yield "", _experts(s["experts"]), False
        if s["costs_from"]:
            yield "", f"costs: {s['costs_from']}", False


def _sums(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield lines about the whole."""
    causes = ", ".join(f"{format_nbytes(n)} {cause}" for cause, n in plan["by_cause"].items())
    peak, limit = plan["peak_nbytes"], plan["budget"]["nbytes"]
    over = limit is not None and peak > limit
    of = "" if limit is None else f" of a budget of {format_nbytes(limit)}"
    yield "peak", f"{format_nbytes(peak)}{of}: {causes}", over
    if device := plan.get("device"):
        yield from _device_lines(device)
    whole = beside_stages(plan, "predicted_s").get("in all", plan["predicted_s"])
    time = f"{seconds(whole)}, {seconds(plan['stall_s'])} of it waiting for loads"
    read = f"{format_nbytes(plan['read_nbytes'])} are read"
    if plan["read_nbytes"] and plan["read_a_year_nbytes"]:
        read += f", {a_year_text(plan['read_a_year_nbytes'])}"
    yield "in all", f"{time}; {read}", False
    yield "more", larger_text(plan["larger"]), False


def _device_lines(device: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield lines about a device: what is held there, what its link is taken for."""
    budget, link = device["budget"], device["link"]
    causes = ", ".join(f"{format_nbytes(n)} {cause}" for cause, n in budget["by_cause"].items())
    held = f"{format_nbytes(budget['peak_nbytes'])} of {format_nbytes(budget['nbytes'])}: {causes}"
    yield "device", f"{device['name']}: {held}", budget["peak_nbytes"] > budget["nbytes"]
    sure = "measured" if link["measured"] else "assumed"
    speeds = f"{link['bytes_per_s'] / 1e9:.0f} GB/s, its arithmetic {device['flops'] / 1e12:.0f} TFLOP/s"
    yield "", f"its link: {speeds}, {sure}", False


def _experts(experts: Mapping[str, Any]) -> str:
    """Return how experts are read."""
    said = []
    if experts["count"]:
        said.append(
            f"{experts['count']} experts of {format_nbytes(experts['nbytes'])} in all are read as tokens are "
            f"routed to them, past the reads below; {format_nbytes(experts['least_nbytes'])} to compute with"
        )
    if experts["a_token_nbytes"]:
        said[0] += f", {format_nbytes(experts['a_token_nbytes'])} a token"
    for reason in dict.fromkeys(experts["whole"].values()):
        paths = [path for path, why in experts["whole"].items() if why == reason]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        said.append(f"{paths[0]}{more}: all experts are read with their block, as {reason}")
    return f"experts: {'; '.join(said)}"


def _staying(stage: Mapping[str, Any]) -> str:
    """Return what is retained and why: by reason, the first names of each."""
    if len(stage["retained"]) == stage["segments"]:
        return "everything"
    by_reason: dict[str, list[str]] = {}
    for name in stage["retained"]:
        by_reason.setdefault(stage["why"].get(name) or "", []).append(name)
    said = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        said.append(f"{shown} ({reason})")
    return "; ".join(said)


def _print_curve(plan: Mapping[str, Any], console: Console) -> None:
    """Draw time against budget, a bar a point; the knee, the end of gains and this plan are marked."""
    points: Sequence[Mapping[str, Any]] = plan["curve"]
    most = max(p["predicted_s"] for p in points) or 1.0
    here = max(
        (p["budget_nbytes"] for p in points if p["budget_nbytes"] <= plan["peak_nbytes"]),
        default=points[0]["budget_nbytes"],
    )
    console.print(Text("budget     predicted", style="bold"))
    flat = [p for p in points if p["budget_nbytes"] > plan["enough_nbytes"]]
    for p in points:
        if p in flat[:-1] and p["budget_nbytes"] != here:
            continue
        marks = []
        if p["budget_nbytes"] == plan["knee_nbytes"]:
            marks.append("the knee")
        if p["budget_nbytes"] == here:
            marks.append("this plan")
        if p["budget_nbytes"] >= plan.get("all_nbytes", points[-1]["budget_nbytes"]):
            marks.append("everything stays")
        bar = "\u2588" * max(1, round(BAR * p["predicted_s"] / most))
        line = Text(f"{format_nbytes(p['budget_nbytes'], up=True):<11}{seconds(p['predicted_s']):<12}")
        line.append(bar, style="red" if p["budget_nbytes"] in (plan["knee_nbytes"], here) else "bright_black")
        line.append(f"  {', '.join(marks)}", style="bold")
        console.print(line)
    console.print(Text("; ".join(plan["advice"])))
