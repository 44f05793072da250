"""What a run costs in reading, and what a larger budget would save: of a plan, of a run as measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.plan.planner import Plan
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Exactly, Schedule, Stage
from blockstream.plan.tiers import TopPlan

from .curve import NOTHING, Point, budget_curve, enough, knee, seconds

#: A schedule of more visits is not planned again when its run is over: that would take long.
MOST_VISITS = 20_000
YEAR_S = 365 * 86_400


def curve_of(made: Plan, policies: Sequence[RetentionPolicy], also: Iterable[int]) -> list[Point]:
    """Return the curve of a plan's schedule; of a device's plan that of the host memory below it."""
    if isinstance(made, TopPlan):
        return budget_curve(made.host.schedule, policies, also=also, predicted=made.over)
    return budget_curve(made.schedule, policies, lookahead=made.lookahead, also=also)


def larger_budgets(
    points: Sequence[Point], arena_nbytes: int, budget_of: Callable[[int], int]
) -> list[dict[str, Any]]:
    """Return the knee of a curve and where it turns flat, as far as they are above an arena.

    Each with `budget_nbytes`, `more_nbytes` (beside the arena's), `saves_s`, `saves_read_nbytes`. None of
    them: more memory saves nothing.
    """
    here = max((p for p in points if p.arena_nbytes <= arena_nbytes), key=_arena, default=points[0])
    found: list[dict[str, Any]] = []
    for point in dict.fromkeys((knee(points), enough(points), points[-1])):
        if point is None or point.arena_nbytes <= max(here.arena_nbytes, arena_nbytes):
            continue
        saves_s = here.predicted_s - point.predicted_s
        saves_read = here.read_nbytes - point.read_nbytes
        last = found[-1] if found else {"saves_s": 0.0, "saves_read_nbytes": 0}
        gains = saves_s > last["saves_s"] + NOTHING * here.predicted_s
        if (gains and saves_s >= 0.005) or (not found and saves_read > 0):
            found.append(
                {
                    "budget_nbytes": budget_of(point.arena_nbytes),
                    "more_nbytes": budget_of(point.arena_nbytes) - budget_of(arena_nbytes),
                    "saves_s": saves_s,
                    "saves_read_nbytes": saves_read,
                }
            )
    return found


def larger_for_run(
    plan: Plan | None,
    stages: Sequence[Mapping[str, Any]],
    policies: Sequence[RetentionPolicy],
    summary: Mapping[str, Any],
    activations_beside: Callable[[int], int],
) -> list[dict[str, Any]] | None:
    """Return what a larger budget would have saved a run, by the seconds it was measured to take.

    `plan` is the first plan, `stages` and `summary` what report.json has of the run; budgets leave out what
    the runtime takes. None for a run that computed nothing, that is too long to be planned again, or that was
    on a device, where two budgets would have to grow.
    """
    if plan is None or not stages or isinstance(plan, TopPlan):
        return None
    schedule = as_measured(plan.schedule, stages)
    if sum(len(s.order) * s.passes.expected for s in schedule.stages) > MOST_VISITS:
        return None
    arena = int(summary["arena"]["nbytes"])
    points = budget_curve(schedule, policies, lookahead=plan.lookahead, also=[arena])
    return larger_budgets(points, arena, lambda nbytes: nbytes + activations_beside(nbytes))


def as_measured(schedule: Schedule, stages: Sequence[Mapping[str, Any]]) -> Schedule:
    """Return a schedule with the passes that ran, and seconds in proportion to those measured."""
    by_name = {s["name"]: s for s in stages}
    return replace(schedule, stages=tuple(_scaled(s, by_name.get(s.name, {})) for s in schedule.stages))


def a_year(nbytes: int, took_s: float) -> int | None:
    """Return the bytes that a year has, of what reads so many in so many seconds again and again."""
    return round(nbytes / took_s * YEAR_S) if took_s > 0 else None


def a_year_text(nbytes: int) -> str:
    """Return in words what a year of such runs reads."""
    amount = f"{nbytes / (1 << 50):,.1f} PiB" if nbytes >= 1 << 50 else format_nbytes(nbytes)
    return f"{amount} a year at this rate"


def larger_text(larger: Sequence[Mapping[str, Any]]) -> str:
    """Return in words what larger budgets save."""
    if not larger:
        return "a larger budget saves nothing"
    parts = []
    for one in larger:
        gains = [seconds(one["saves_s"])] if one["saves_s"] >= 0.005 else []
        if one["saves_read_nbytes"] > 0:
            gains.append(f"{format_nbytes(one['saves_read_nbytes'])} of reading")
        parts.append(f"+{format_nbytes(one['more_nbytes'], up=True)} of budget saves {' and '.join(gains)}")
    return "; ".join(parts)


def _scaled(stage: Stage, measured: Mapping[str, Any]) -> Stage:
    predicted = measured.get("predicted") or {}
    load = _ratio(measured.get("load_s"), predicted.get("load_s"))
    execute = _ratio(measured.get("execute_s"), predicted.get("execute_s"))
    segments = tuple(
        replace(s, load_s=s.load_s * load, execute_s=s.execute_s * execute) for s in stage.segments
    )
    passes = Exactly(measured["passes"]) if measured.get("passes") else stage.passes
    return replace(stage, segments=segments, passes=passes)


def _ratio(measured: Any, predicted: Any) -> float:
    if not isinstance(measured, int | float) or not predicted:
        return 1.0
    return float(measured / predicted)


def _arena(point: Point) -> int:
    return point.arena_nbytes
