"""What each stage of a run cost, read off the plan and the ledger: the terms of Eq. 8 and Eq. 9."""

from __future__ import annotations

from collections.abc import Iterable, Set
from math import inf
from typing import Any

from blockstream.engine.spans import Total
from blockstream.plan import latency
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Stage


def stage_summaries(plan: Plan, totals: Iterable[Total]) -> list[dict[str, Any]]:
    """Return one summary a stage, in order, as report.json has its stages; `totals` are those of its spans.

    b streamed or retained blocks a pass (what is resident is none), d of them retained; l_s and e_s the
    mean seconds of a load and a visit; r_s saved a pass against b (l + e), alpha_s what Eq. 9 needs to meet
    the measured pass, both without what runs outside the blocks; wall_s from the stage's first wait to its
    last visit, all included. Over a device what executes there counts, and copies have sums of their own.
    """
    seen = [_Seen({s.segments[i].name for i in _blocks(s)}) for s in plan.schedule.stages]
    totals = [total for total in totals if total.stage is not None]
    for total in totals:
        if total.kind == "compute" and total.stage is not None:
            seen[total.stage].is_device = True
    for total in totals:
        if total.stage is not None:
            seen[total.stage].add(total)
    return [_summary(plan, i, x) for i, x in enumerate(seen)]


#: What a device's spans count as.
_ON_DEVICE = {"compute": "execute"}


class _Seen:
    """What a summary needs of a stage's spans."""

    def __init__(self, blocks: Set[str]) -> None:
        self._blocks = blocks
        self.passes = self.read_nbytes = self.copied_nbytes = 0
        self.copy_s = 0.0
        #: The host's visits, where a device computed: it only issued them.
        self.is_device = False
        self.begin_s, self.end_s = inf, 0.0
        #: Seconds by kind: of all spans, and, with their number, of the blocks'.
        self.all = dict.fromkeys(("load", "execute", "stall"), 0.0)
        self.blocks = dict.fromkeys(self.all, 0.0)
        self.count = dict.fromkeys(self.all, 0)

    def add(self, total: Total) -> None:
        """Take in all spans of a kind and a segment."""
        if total.kind == "copy":
            self.copy_s, self.copied_nbytes = self.copy_s + total.seconds, self.copied_nbytes + total.nbytes
        if total.kind == "execute" and self.is_device:
            self.begin_s, self.end_s = min(self.begin_s, total.begin_s), max(self.end_s, total.end_s)
            self.passes = max(self.passes, total.passes)
            return
        total = total._replace(kind=_ON_DEVICE.get(total.kind, total.kind))
        if total.kind not in self.all:
            return
        self.all[total.kind] += total.seconds
        if total.label in self._blocks:
            self.blocks[total.kind] += total.seconds
            self.count[total.kind] += total.number
        if total.kind == "load":
            self.read_nbytes += total.nbytes
            return
        self.begin_s, self.end_s = min(self.begin_s, total.begin_s), max(self.end_s, total.end_s)
        if total.kind == "execute":
            self.passes = max(self.passes, total.passes)

    def mean_s(self, kind: str) -> float:
        """Return what one span of the blocks took, 0 where there was none."""
        return self.blocks[kind] / max(1, self.count[kind])


def _blocks(stage: Stage) -> list[int]:
    """Return the segments of a stage that are visited and not resident."""
    return [i for i in stage.visited if not stage.segments[i].resident]


def _summary(plan: Plan, index: int, seen: _Seen) -> dict[str, Any]:
    stage, planned = plan.schedule.stages[index], plan.stages[index]
    kept = sum(i in planned.layout.retained for i in _blocks(stage))
    passes = seen.passes
    load_s, execute_s, stall_s = seen.all.values()
    l_s, e_s = seen.mean_s("load"), seen.mean_s("execute")
    b = len([i for i in stage.order if not stage.segments[i].resident])
    a_pass = (seen.blocks["execute"] + seen.blocks["stall"]) / passes if passes else 0.0
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
        "begin_s": seen.begin_s if seen.end_s else 0.0,
        "wall_s": max(0.0, seen.end_s - seen.begin_s),
        "read_nbytes": seen.read_nbytes,
        **({"copy_s": seen.copy_s, "copied_nbytes": seen.copied_nbytes} if seen.is_device else {}),
    }
