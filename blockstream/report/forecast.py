"""A plan for people and programs: what stays and why, times, memory by cause, what more memory buys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.plan.arrangement import StagePlan
from blockstream.plan.layout import align_up
from blockstream.plan.plain import passes_are, why_retained
from blockstream.plan.planner import Plan
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Stage
from blockstream.plan.simulate import StagePrediction
from blockstream.plan.tiers import TopPlan

from .curve import advice, enough, knee, shown
from .larger import a_year, curve_of, larger_budgets

SCHEMA = 1

#: A finer cut is worth a word when it needs this much less.
FINER = 0.02


def plan_account(
    made: Plan,
    items: Sequence[Mapping[str, Any]],
    policies: Sequence[RetentionPolicy],
    costs_from: Mapping[str, str],
    runtime_nbytes: int,
    activations_beside: Callable[[int], int],
    budget_nbytes: int | None = None,
    arena_nbytes: int | None = None,
    finest_arena_nbytes: int | None = None,
    device: Mapping[str, Any] | None = None,
    experts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what `plan --json` prints.

    `items` are what the run consists of, see `items.py`; `costs_from` says by stage where its costs come
    from, `runtime_nbytes` what the process holds before any weight, `activations_beside(arena)` the bytes
    kept free beside an arena. `budget_nbytes` and
    `arena_nbytes` are the limits asked for, None where there is none, `finest_arena_nbytes` the least that
    segments could be cut for, with what its experts take. `device` is what is planned to be held there:
    budgets and arenas are host memory's, and the curve is for the device's plan as it is. `experts` by stage
    are those that are read as they are routed to: the bytes of all and of the least to compute with. Asks the
    planner some 15 times.
    """
    host = made.host if isinstance(made, TopPlan) else made
    shelf: int = sum(x["least_nbytes"] for x in experts.values())

    def budget_of(arena: int) -> int:
        return runtime_nbytes + arena + shelf + activations_beside(arena + shelf)

    points = curve_of(made, policies, [host.arena_nbytes])
    bend, last = knee(points), enough(points)
    own = points[0].arena_nbytes
    finest = own if finest_arena_nbytes is None else min(own, finest_arena_nbytes - shelf)
    is_finer = budget_of(finest) < (1 - FINER) * budget_of(own)
    said = advice(points, budget_of, None if is_finer else budget_of(finest))
    if is_finer:
        said.insert(1, f"{format_nbytes(budget_of(finest), up=True)} with segments cut finer")
    stages = [
        {
            **_stage_account(stage, planned, predicted, costs_from.get(stage.name, "")),
            **({} if host is made else _tiers_account(predicted, host.schedule.stages[i], host.stages[i])),
            **({"experts": experts[stage.name]} if stage.name in experts else {}),
        }
        for i, (stage, planned, predicted) in enumerate(
            zip(made.schedule.stages, made.stages, made.predicted.stages, strict=True)
        )
    ]
    causes = {
        "runtime": runtime_nbytes,
        "weights": host.arena_nbytes,
        **({"experts": shelf} if shelf else {}),
        "activations": activations_beside(host.arena_nbytes + shelf),
    }
    return {
        "schema": SCHEMA,
        "budget": {"nbytes": budget_nbytes, "arena_nbytes": arena_nbytes},
        "stages": stages,
        "items": list(items),
        "predicted_s": made.predicted.wall_s,
        "stall_s": sum(s["stall_s"] for s in stages),
        "read_nbytes": made.predicted.read_nbytes,
        "read_a_year_nbytes": a_year(made.predicted.read_nbytes, made.predicted.wall_s),
        "peak_nbytes": sum(causes.values()),
        "by_cause": causes,
        "curve": [
            {
                "budget_nbytes": budget_of(p.arena_nbytes),
                "arena_nbytes": p.arena_nbytes,
                "predicted_s": p.predicted_s,
                "read_nbytes": p.read_nbytes,
            }
            for p in shown(points, budget_of)
        ],
        "knee_nbytes": None if bend is None else budget_of(bend.arena_nbytes),
        "all_nbytes": budget_of(points[-1].arena_nbytes),
        "enough_nbytes": budget_of(last.arena_nbytes),
        "least_nbytes": budget_of(finest),
        "advice": said,
        "larger": larger_budgets(points, host.arena_nbytes, budget_of),
        **({} if device is None else {"device": dict(device)}),
    }


def _tiers_account(predicted: StagePrediction, stage: Stage, planned: StagePlan) -> dict[str, Any]:
    """Return what goes over the link, and what host memory keeps of a stage."""
    retained = [stage.segments[i] for i in planned.retained]
    return {
        "copy_s": predicted.copy_s,
        "copied_nbytes": predicted.copied_nbytes,
        "host": {"retained": len(retained), "retained_nbytes": sum(align_up(s.nbytes) for s in retained)},
    }


def _stage_account(
    stage: Stage, planned: StagePlan, predicted: StagePrediction, costs_from: str
) -> dict[str, Any]:
    everything = set(planned.retained) >= set(stage.visited)
    largest = max((stage.segments[i] for i in stage.visited), key=lambda s: s.nbytes)
    retained = [i for i in stage.visited if i in set(planned.retained)]
    return {
        "name": stage.name,
        "passes": predicted.passes,
        "passes_are": passes_are(stage.passes),
        "policy": planned.policy,
        "segments": len(stage.visited),
        "visits": len(stage.order),
        "nbytes": stage.nbytes,
        "largest": {"name": largest.name, "nbytes": largest.nbytes},
        "kinds": _kinds(stage),
        "retained": [stage.segments[i].name for i in retained],
        "retained_nbytes": sum(align_up(stage.segments[i].nbytes) for i in retained),
        "why": {stage.segments[i].name: why_retained(stage, i, planned.policy, everything) for i in retained},
        "slots": planned.slots if not everything else 0,
        "predicted_s": predicted.wall_s,
        "execute_s": predicted.execute_s,
        "load_s": predicted.load_s,
        "stall_s": predicted.stall_s,
        "read_nbytes": predicted.read_nbytes,
        "costs_from": costs_from,
    }


def _kinds(stage: Stage) -> list[dict[str, Any]]:
    """Return the segments by kind: those whose names differ in a number only."""
    kinds: dict[str, list[int]] = {}
    for i in stage.visited:
        kinds.setdefault(re.sub(r"\d+", "*", stage.segments[i].name), []).append(stage.segments[i].nbytes)
    return [
        {"name": name, "count": len(sizes), "nbytes": sum(sizes), "largest_nbytes": max(sizes)}
        for name, sizes in kinds.items()
    ]


def in_words(kinds: Sequence[Mapping[str, Any]]) -> str:
    """Return kinds of segments for people: "28 x spatial_blocks.* of 81 MiB"."""
    said = []
    for kind in kinds:
        equal = kind["nbytes"] > 0.99 * kind["count"] * kind["largest_nbytes"]
        size = f"{'' if equal else 'at most '}{format_nbytes(kind['largest_nbytes'])}"
        said.append(
            f"{kind['count']} x {kind['name']} of {size}"
            if kind["count"] > 1
            else f"{kind['name']} of {size}"
        )
    return ", ".join(said)
