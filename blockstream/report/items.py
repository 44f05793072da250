"""All that a run consists of, in order: its set-up, its stages, the rest; predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What comes before the first stage computes, and what is in no stage: results, states, the report.
SETUP, REST = "set-up", "rest"


def predicted_items(setup_s: float, stages: Mapping[str, float], rest_s: float) -> list[dict[str, Any]]:
    """Return the items of a run with the seconds that each is predicted to take."""
    items = {SETUP: setup_s, **stages, REST: rest_s}
    return [{"name": name, "predicted_s": s} for name, s in items.items()]


def measured_items(
    predicted: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], wall_s: float
) -> list[dict[str, Any]]:
    """Return the same with what each took of `wall_s`; `stages` are those of the report.

    What is predicted of a stage is what `stages` has: for the passes that ran.
    """
    took = {s["name"]: float(s["wall_s"]) for s in stages}
    setup_s = min((float(s["begin_s"]) for s in stages if s["wall_s"]), default=wall_s)
    took |= {SETUP: setup_s, REST: max(0.0, wall_s - setup_s - sum(took.values()))}
    ran = {s["name"]: s["predicted_s"] for s in stages if "predicted_s" in s}
    return [
        {
            "name": item["name"],
            "predicted_s": ran.get(item["name"], item["predicted_s"]),
            "measured_s": took.get(item["name"], 0.0),
        }
        for item in predicted
    ]


def beside_stages(of: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return a number of the items that are no stages, and the sum of all as "in all"; {} without items."""
    items = [
        x for x in of.get("items") or () if isinstance(x, Mapping) and isinstance(x.get(key), int | float)
    ]
    if not items:
        return {}
    found = {str(x["name"]): float(x[key]) for x in items if x.get("name") in (SETUP, REST)}
    return {**found, "in all": sum(float(x[key]) for x in items)}
