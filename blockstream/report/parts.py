"""One part of a run, from its ledger, read twice: once to know its plans and its length, once for its bars.

However long a run was, few bars are held: the first passes of each stage and its last as they were, the
others merged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockstream.engine.ledger import Note, began_of, read_rows
from blockstream.engine.spans import Span

from .bars import Bar, Merger

#: A part with more spans than this has those of its middle passes merged.
MOST_BARS = 20_000
#: The passes of a stage that stay as they were, beside its last.
HEAD = 4
#: Notes of one kind beyond this are passed over, but for plans: a sampling has one a step.
MOST_NOTES = 20_000


class Part:
    """A ledger's notes, and what there is to know before its bars are read.

    Raises ValueError naming a line that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = began_of(path)
        self.notes: list[Note] = []
        self.spans = 0
        self.end_s = 0.0
        self._last: dict[int, int] = {}
        kinds: defaultdict[str, int] = defaultdict(int)
        for row in read_rows(path):
            if isinstance(row, Note):
                kinds[row.kind] += 1
                if row.kind == "plan" or kinds[row.kind] <= MOST_NOTES:
                    self.notes.append(row)
                continue
            self.spans += 1
            self.end_s = max(self.end_s, row.end_s)
            if row.visit is not None:
                stage = row.visit.stage
                self._last[stage] = max(self._last.get(stage, 0), row.visit.pass_index)

    @property
    def is_merged(self) -> bool:
        """Return whether there are more spans than are shown one by one."""
        return self.spans > MOST_BARS

    def bars(
        self, report: Mapping[str, Any], stages: dict[str, Mapping[str, Any]], executed: dict[str, float]
    ) -> list[Bar]:
        """Return the part's bars, few; adds to `stages` and, in seconds, to what each has `executed`."""
        merger = Merger(8 * self.end_s / MOST_BARS)
        for span, bar in self._resolved(report, stages):
            if bar.kind == "execute":
                executed[bar.stage] = executed.get(bar.stage, 0.0) + bar.seconds
            visit = span.visit
            shown = visit is not None and (
                visit.pass_index < HEAD or visit.pass_index == self._last[visit.stage]
            )
            merger.add(bar, alone=shown or not self.is_merged)
        return merger.bars()

    def _resolved(
        self, report: Mapping[str, Any], stages: dict[str, Mapping[str, Any]]
    ) -> Iterator[tuple[Span, Bar]]:
        """Yield spans and their bars, naming stages and what is retained by the plan in force."""
        plans = [(n.at_s, n.value) for n in self.notes if n.kind == "plan" and _is_plan(n.value)]
        for _, plan in plans:
            for stage in plan["stages"]:
                stages[stage["name"]] = stage
        reported = [str(s.get("name")) for s in report.get("stages") or ()]
        begins = [at for at, _ in plans]
        known: dict[tuple[int, int], tuple[str, list[int], set[int]]] = {}
        for k, (_, plan) in enumerate(plans):
            for i, stage in enumerate(plan["stages"]):
                known[k, i] = (stage["name"], stage["order"], set(stage["retained"]))
        for span in read_rows(self.path):
            if isinstance(span, Note):
                continue
            name, retained, passed = "", False, -1
            if span.visit is not None:
                passed = span.visit.pass_index
                k = max(0, bisect_right(begins, span.start_s) - 1)
                if (k, span.visit.stage) in known:
                    name, order, kept = known[k, span.visit.stage]
                    at = span.visit.position
                    retained = (order[at] if at < len(order) else at - len(order)) in kept
                else:
                    name = _name_of(span.visit.stage, reported)
                stages.setdefault(name, {})
            yield (
                span,
                Bar(
                    *(span.thread, span.kind, span.start_s, span.end_s, span.label),
                    *(name, passed, retained, span.nbytes),
                ),
            )


def _name_of(stage: int, reported: Sequence[str]) -> str:
    return reported[stage] if stage < len(reported) else f"stage {stage}"


def _is_plan(value: Any) -> bool:
    """Return whether a note has the plan's parts that a report uses."""
    try:
        return all(
            isinstance(s["name"], str) and are_numbers(s["order"]) and are_numbers(s["retained"])
            for s in value["stages"]
        )
    except (KeyError, TypeError):
        return False


def are_numbers(value: Any, length: int | None = None) -> bool:
    """Return whether a value is a list of whole numbers, of a length if one is named."""
    return isinstance(value, list) and all(isinstance(x, int) for x in value) and length in (None, len(value))
