"""What each stage of a run cost, read off the plan and the ledger: the terms of Eq. 8 and Eq. 9."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Set
from math import inf
from statistics import fmean
from typing import Any

from blockstream.engine.ledger import Span
from blockstream.plan import latency
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Stage


def stage_summaries(plan: Plan, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return one summary a stage, in order, as report.json has its stages.

    b streamed or retained blocks a pass (what is resident is none), d of them retained; l_s and e_s the
    mean seconds of a load and a visit; r_s saved a pass against b (l + e), alpha_s what Eq. 9 needs to meet
    the measured pass, both without what runs outside the blocks; wall_s from the stage's first wait to its
    last visit, all included.
    """
    seen = [_Seen({s.segments[i].name for i in _blocks(s)}) for s in plan.schedule.stages]
    for span in spans:
        if span.visit is not None:
            seen[span.visit.stage].add(span)
    return [_summary(plan, i, x) for i, x in enumerate(seen)]


class _Seen:
    """What a summary needs of a stage's spans, a few bytes each: a long run has millions."""

    def __init__(self, blocks: Set[str]) -> None:
        self._blocks = blocks
        self.passes = self.read_nbytes = 0
        self.begin_s, self.end_s = inf, 0.0
        #: Seconds by kind: of all spans, and of the blocks'.
        self.all: dict[str, array[float]] = {k: array("d") for k in ("load", "execute", "stall")}
        self.blocks: dict[str, array[float]] = {k: array("d") for k in self.all}

    def add(self, span: Span) -> None:
        """Take in a span that has a visit."""
        if span.kind not in self.all or span.visit is None:
            return
        self.all[span.kind].append(span.seconds)
        if span.label in self._blocks:
            self.blocks[span.kind].append(span.seconds)
        if span.kind == "load":
            self.read_nbytes += span.nbytes
            return
        self.begin_s, self.end_s = min(self.begin_s, span.start_s), max(self.end_s, span.end_s)
        if span.kind == "execute":
            self.passes = max(self.passes, span.visit.pass_index + 1)


def _blocks(stage: Stage) -> list[int]:
    """Return the segments of a stage that are visited and not resident."""
    return [i for i in stage.visited if not stage.segments[i].resident]


def _summary(plan: Plan, index: int, seen: _Seen) -> dict[str, Any]:
    stage, planned = plan.schedule.stages[index], plan.stages[index]
    kept = sum(i in planned.layout.retained for i in _blocks(stage))
    passes = seen.passes
    load_s, execute_s, stall_s = (sum(seen.all[kind]) for kind in ("load", "execute", "stall"))
    l_s = fmean(seen.blocks["load"] or [0.0])
    e_s = fmean(seen.blocks["execute"] or [0.0])
    b = len([i for i in stage.order if not stage.segments[i].resident])
    a_pass = (sum(seen.blocks["execute"]) + sum(seen.blocks["stall"])) / passes if passes else 0.0
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
        "overlap": latency.overlap(load_s, stall_s),
        "load_s": load_s,
        "execute_s": execute_s,
        "stall_s": stall_s,
        "wall_s": max(0.0, seen.end_s - seen.begin_s),
        "read_nbytes": seen.read_nbytes,
    }
