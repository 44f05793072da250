"""What a run came to: predicted against measured, where memory and time went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from blockstream.engine.ledger import Ledger, Note
from blockstream.engine.spans import Span
from blockstream.plan import latency
from blockstream.plan.plain import prediction_record
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Exactly, Schedule
from blockstream.plan.simulate import Prediction
from blockstream.plan.tiers import TopPlan
from blockstream.system.disks import disk_speed
from blockstream.system.memory import MemoryWatch

from .larger import a_year


def predicted_for(plan: Plan, passes: Mapping[str, int]) -> Prediction:
    """Return what a plan predicts for the numbers of passes that ran: a sampler may end a stage early."""

    def ran(schedule: Schedule) -> Schedule:
        stages = (
            replace(s, passes=Exactly(passes[s.name])) if s.name in passes else s for s in schedule.stages
        )
        return replace(schedule, stages=tuple(stages))

    if isinstance(plan, TopPlan):
        plan = replace(plan, host=replace(plan.host, schedule=ran(plan.host.schedule)))
    return replace(plan, schedule=ran(plan.schedule)).predicted


def stage_accounts(measured: Sequence[Mapping[str, Any]], plan: Plan | None) -> list[dict[str, Any]]:
    """Return each stage's summary with what the first plan predicted beside it.

    `predicted_s` is for the passes that ran, `declared_s` for those that were declared; `r8_s` and `r9_s`
    what Eq. 8 and Eq. 9 say was saved a pass, without overhead.
    """
    passes = {s["name"]: s["passes"] for s in measured}
    ran = predicted_for(plan, passes).stages if plan else ()
    declared = plan.predicted.stages if plan else ()
    by_name = {p.name: (p, q) for p, q in zip(ran, declared, strict=True)}
    accounts = []
    for s in measured:
        b, d, l, e = s["b"], s["d"], s["l_s"], s["e_s"]
        account = {
            **s,
            "outside_s": max(0.0, s["wall_s"] - s["execute_s"] - s["stall_s"]),
            "r8_s": latency.concurrent_saving_s(b, l, e),
            "r9_s": latency.dynamic_saving_s(b, min(d, b), l, e),
            "read_bytes_per_s": s["read_nbytes"] / s["load_s"] if s["load_s"] > 0 else None,
        }
        if s["name"] in by_name:
            p, whole = by_name[s["name"]]
            account |= {"predicted_s": p.wall_s, "declared_passes": whole.passes, "declared_s": whole.wall_s}
            account["predicted"] = {k: v for k, v in prediction_record(p).items() if k != "wall_s"}
        accounts.append(account)
    return accounts


def budget_account(
    watch: MemoryWatch, began_s: float, spans: Iterable[Span], runtime: int, activations: int
) -> dict[str, Any]:
    """Return whether the budget was held (a watch that failed cannot say), its peak by cause and what ran.

    `began_s` is when the watch began, in the ledger's time; `runtime` what was held before any weight,
    `activations` the most a pass held besides.
    """
    at_s = began_s + watch.peak.at_s
    return {
        "nbytes": watch.budget_nbytes,
        "peak_nbytes": watch.peak_nbytes,
        "held": not watch.broken and watch.failure is None,
        "by_cause": watch.by_cause(runtime=runtime, activations=activations),
        "peak_at_s": at_s,
        "peak_during": doing(spans, at_s),
    }


def doing(spans: Iterable[Span], at_s: float) -> str:
    """Return what the compute thread was doing at a moment, in words."""
    for span in spans:
        if span.thread == "compute" and span.start_s <= at_s <= span.end_s:
            verb = {"execute": "computing ", "stall": "waiting for ", "outside": ""}.get(span.kind, "")
            return f"{verb}{span.label or span.kind}"
    return ""


def disk_account(stages: Sequence[Mapping[str, Any]], wall_s: float) -> dict[str, Any]:
    """Return what all loads read and how fast, beside the disk's own speed, measured once a disk.

    `a_year_nbytes` is what would be read in a year of such runs, one after another.
    """
    load_s = sum(s["load_s"] for s in stages)
    read = sum(s["read_nbytes"] for s in stages)
    files = sorted({Path(f) for s in stages for f in s.get("files", ())})
    return {
        "read_nbytes": read,
        "a_year_nbytes": a_year(read, wall_s),
        "read_bytes_per_s": read / load_s if load_s > 0 else None,
        "disk_bytes_per_s": disk_speed(files) if read else None,
    }


def sampler_account(choice: Any, notes: Iterable[Note]) -> dict[str, Any]:
    """Return what the sampler did: passes of how many steps, and where it leapt, for each sampling."""
    runs: dict[int, dict[str, Any]] = {}
    for step in (n.value for n in notes if n.kind == "step"):
        run = runs.setdefault(step["run"], {"passes": 0, "of": 0, "leaps": []})
        run |= {"passes": run["passes"] + int(step.get("passes", 1)), "of": step["of"]}
        if step["to"] > step["i"] + 1:
            run["leaps"].append([step["i"], step["to"]])
    return {
        "choice": choice,
        "passes": sum(run["passes"] for run in runs.values()),
        "of": sum(run["of"] for run in runs.values()),
        "runs": [run for _, run in sorted(runs.items())],
    }


def attention_account(
    choices: Sequence[Any],
    layers: int,
    ledger: Ledger,
    kernels: Mapping[str, Any] | None = None,
    said: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what attention transforms came to: the passes that merged, a pass with and without.

    `kernels` is what plugins' kernels computed, `said` is what the transforms themselves report, by name.
    """
    switches = [(n.at_s, bool(n.value)) for n in ledger.all_notes() if n.kind == "merging"]
    merged: list[float] = []
    plain: list[float] = []
    if switches:
        for end, seconds in _passes(ledger.all_spans, switches[0][0]):
            on = [state for at, state in switches if at <= end]
            (merged if on and on[-1] else plain).append(seconds)
    return {
        "choices": list(choices),
        "merged_layers": layers,
        "merged_passes": len(merged),
        "plain_passes": len(plain),
        "merged_pass_s": median(merged) if merged else None,
        "plain_pass_s": median(plain) if plain else None,
        "kernels": dict(kernels or {}),
        "said": dict(said or {}),
    }


def _passes(spans: Callable[[], Iterator[Span]], inside_s: float) -> list[tuple[float, float]]:
    """Return (end, seconds of compute) of each pass of the stage that computes at a moment."""
    stage = next(
        (s.visit.stage for s in spans() if s.kind == "execute" and s.visit and s.end_s >= inside_s), None
    )
    ends: dict[int, float] = {}
    took: dict[int, float] = {}
    for span in spans():
        if span.kind == "execute" and span.visit is not None and span.visit.stage == stage:
            ends[span.visit.pass_index] = span.end_s
            took[span.visit.pass_index] = took.get(span.visit.pass_index, 0.0) + span.seconds
    return [(ends[p], took[p]) for p in ends]
