"""What a run takes before its first block and beside its stages: from earlier runs of its pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockstream.report.items import REST, SETUP, predicted_items
from blockstream.system import calibration

#: Seconds from a plan to the first block, and beside stages, before a run has been measured.
START_S, REST_S = 0.2, 0.6


def predicted(
    pipeline: str, threads: int, planned_s: float, stages: Mapping[str, float], planning: bool
) -> list[dict[str, Any]]:
    """Return the items of a run whose plan was made `planned_s` seconds after it began.

    While `planning`, what a run's set-up took before tells more than what this one did.
    """
    kept = calibration.read(calibration.around_of(pipeline, threads))
    setup_s = planned_s + kept.get("start", START_S)
    if planning:
        setup_s = kept.get(SETUP, setup_s)
    return predicted_items(setup_s, stages, kept.get(REST, REST_S))


def remember(pipeline: str, threads: int, planned_s: float, items: Sequence[Mapping[str, Any]]) -> None:
    """Keep what a run took around its stages."""
    took = {item["name"]: item["measured_s"] for item in items}
    numbers = {"start": max(0.0, took[SETUP] - planned_s), SETUP: took[SETUP], REST: took[REST]}
    calibration.write(calibration.around_of(pipeline, threads), numbers)
