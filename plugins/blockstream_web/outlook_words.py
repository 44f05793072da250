"""A plan in the page's words: how long, in how much memory, and what more would save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockstream.budget.amounts import format_nbytes

#: A gain below this part of the time, or below a tenth of a second, is not worth a word.
NOTHING, NOTHING_S = 0.01, 0.1


def duration(seconds: float) -> str:
    """Return a time for people: 0.4 s, 12 s, 4 min 10 s, 1 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def sentence(plan: Mapping[str, Any]) -> str:
    """Return "This takes about 4 min 10 s in 3.3 GiB; +1.0 GiB saves 50 s." of what `plan --json` prints."""
    takes = f"This takes about {duration(plan['predicted_s'])} in {format_nbytes(plan['peak_nbytes'])}"
    better = _better(plan)
    if better is None:
        return f"{takes}; more memory saves nothing."
    more = format_nbytes(better["budget_nbytes"] - plan["peak_nbytes"])
    return f"{takes}; +{more} saves {duration(plan['predicted_s'] - better['predicted_s'])}."


def _better(plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the point of the curve that is worth going to: the knee if it is ahead, else where gains end."""
    least_s = max(NOTHING * plan["predicted_s"], NOTHING_S)
    ahead = [
        point
        for point in plan["curve"]
        if point["budget_nbytes"] > plan["peak_nbytes"]
        and plan["predicted_s"] - point["predicted_s"] >= least_s
    ]
    for stop in (plan["knee_nbytes"], plan["enough_nbytes"]):
        found: Mapping[str, Any] | None = next((p for p in ahead if p["budget_nbytes"] == stop), None)
        if found is not None:
            return found
    return ahead[-1] if ahead else None


def public(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    return {
        "sentence": sentence(plan),
        "advice": plan["advice"],
        "predicted_s": plan["predicted_s"],
        "peak_nbytes": plan["peak_nbytes"],
        "curve": [[point["budget_nbytes"], point["predicted_s"]] for point in plan["curve"]],
    }
