"""What each stage of a run cost, read off the plan and the ledger: the terms of Eq. 8 and Eq. 9."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from blockstream import latency
from blockstream.ledger import Span, overlap
from blockstream.plan import Plan


def stage_summaries(plan: Plan, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return one summary a stage, in order, as report.json has its stages.

    b streamed or retained blocks a pass (what is resident is none), d of them retained; l_s and e_s the
    mean seconds of a load and a visit; r_s saved a pass against b (l + e), alpha_s what Eq. 9 needs to meet
    the measured pass, both without what runs outside the blocks; wall_s from the stage's first wait to its
    last visit, all included.
    """
    visited: dict[int, list[Span]] = {i: [] for i in range(len(plan.stages))}
    for span in spans:
        if span.visit is not None:
            visited[span.visit.stage].append(span)
    return [_summary(plan, i, visited[i]) for i in range(len(plan.stages))]


def _summary(plan: Plan, index: int, spans: list[Span]) -> dict[str, Any]:
    stage, planned = plan.schedule.stages[index], plan.stages[index]
    blocks = [i for i in stage.visited if not stage.segments[i].resident]
    names = {stage.segments[i].name for i in blocks}
    kept = sum(i in planned.layout.retained for i in blocks)
    of = {kind: [s for s in spans if s.kind == kind] for kind in ("load", "execute", "stall")}
    passes = 1 + max((s.visit.pass_index for s in of["execute"] if s.visit), default=-1)
    computed = [*of["execute"], *of["stall"]]
    wall_s = max((s.end_s for s in computed), default=0.0) - min((s.start_s for s in computed), default=0.0)
    l_s = fmean([s.seconds for s in of["load"] if s.label in names] or [0.0])
    e_s = fmean([s.seconds for s in of["execute"] if s.label in names] or [0.0])
    b = len([i for i in stage.order if not stage.segments[i].resident])
    a_pass = sum(s.seconds for s in computed if s.label in names) / passes if passes else 0.0
    return {
        "name": stage.name,
        "passes": passes,
        "b": b,
        "d": kept,
        "policy": planned.policy,
        "slots": planned.slots,
        "l_s": l_s,
        "e_s": e_s,
        "alpha_s": latency.alpha_s(b, kept, l_s, e_s, a_pass) if b and passes and kept <= b else 0.0,
        "r_s": latency.sequential_s(b, l_s, e_s) - a_pass,
        "overlap": overlap(spans),
        "load_s": sum(s.seconds for s in of["load"]),
        "execute_s": sum(s.seconds for s in of["execute"]),
        "stall_s": sum(s.seconds for s in of["stall"]),
        "wall_s": wall_s,
        "read_nbytes": sum(s.nbytes for s in of["load"]),
    }
