"""A run's folder read back: its ledgers, report and config, as far as they are there.

A killed run has no report, an older version's ledger no notes, a resumed run several ledgers: what is
missing is said in `remarks`, and the rest is shown.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from blockstream.engine.ledger import Note, Records, Span, read_records
from blockstream.errors import ConfigError
from blockstream.report.sampling import Steps, samplings
from blockstream.system import regular

#: What is shown of a result.
_SUFFIXES = (".mp4", ".png")
_PICTURES = ("timeline.png", "compare.png")
#: The parts of a report that are tables.
_TABLES = ("budget", "disk", "attention", "output", "versions")


class Bar(NamedTuple):
    """One span, resolved: the stage by name, the segment by name, whether the plan retained it then."""

    thread: str
    kind: str
    start_s: float
    end_s: float
    label: str
    stage: str = ""
    pass_index: int = -1
    retained: bool = False
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        """Return the length."""
        return self.end_s - self.start_s


class Sample(NamedTuple):
    """What was held at one moment, and what of it was the arena."""

    at_s: float
    nbytes: int
    arena_nbytes: int


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it. Times in seconds since the run began."""

    folder: Path
    began: float
    bars: list[Bar]
    notes: list[Note]
    #: The stages in the order they run, and their last plan's record where the ledger has one.
    stages: dict[str, Mapping[str, Any]]
    report: Mapping[str, Any]
    config: str
    #: When each part of a resumed run begins.
    parts: tuple[float, ...] = (0.0,)
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Return whether the run came to its end."""
        return bool(self.report)

    @cached_property
    def wall_s(self) -> float:
        """Return when the last span ended."""
        return max((b.end_s for b in self.bars), default=0.0)

    @cached_property
    def memory(self) -> list[Sample]:
        """Return the memory samples in time's order."""
        found = []
        for note in self.notes:
            if note.kind == "memory" and _are_numbers(note.value, 2):
                found.append(Sample(note.at_s, int(note.value[0]), int(note.value[1])))
        return sorted(found)

    @cached_property
    def steps(self) -> list[Steps]:
        """Return the steps of each sampling."""
        try:
            return samplings(self.notes)
        except (KeyError, TypeError, ValueError):
            return []

    @property
    def budget_nbytes(self) -> int | None:
        """Return the budget, None where nobody said."""
        found = _mapping(self.report.get("budget")).get("nbytes")
        return found if isinstance(found, int) else self._noted_budget

    @cached_property
    def _noted_budget(self) -> int | None:
        return next((n.value for n in self.notes if n.kind == "budget" and isinstance(n.value, int)), None)

    @cached_property
    def results(self) -> list[Path]:
        """Return the videos and pictures the run has made so far."""
        named = _mapping(self.report.get("output")).get("files")
        if isinstance(named, list):
            found = [self.folder / str(name) for name in named]
        else:
            found = sorted(p for p in self.folder.glob("**/*") if p.name not in _PICTURES)
        inside = self.folder.resolve()
        return [
            p for p in found if p.suffix in _SUFFIXES and p.is_file() and p.resolve().is_relative_to(inside)
        ]

    def of(self, stage: str, kind: str | None = None) -> list[Bar]:
        """Return the bars of a stage, of one kind if it is named, in time's order."""
        return [b for b in self.bars if b.stage == stage and kind in (None, b.kind)]


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run: its folder's, or the whole path where two have the same."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def read_run(folder: Path) -> RunRecord:
    """Return what a run's folder holds.

    Raises ConfigError when it holds no ledger and no report, or when a line of them cannot be read.
    """
    remarks: list[str] = []
    report = _read_report(folder / "report.json", remarks)
    ledgers = _ledgers(folder)
    if not ledgers and not report:
        raise ConfigError(f"{folder} holds no run: neither ledger.jsonl nor report.json is there")
    if not ledgers:
        remarks.append("the ledger is missing: no timeline can be drawn")
    parts = [_read_ledger(path) for path in ledgers]
    bars: list[Bar] = []
    notes: list[Note] = []
    stages: dict[str, Mapping[str, Any]] = {}
    offset_s = 0.0
    begins = []
    for part in parts:
        begins.append(offset_s)
        resolved = _resolve(part, report, stages)
        bars += [b._replace(start_s=b.start_s + offset_s, end_s=b.end_s + offset_s) for b in resolved]
        notes += [n._replace(at_s=n.at_s + offset_s) for n in part.notes]
        offset_s = max([offset_s, *(b.end_s for b in bars)])
    ended = report.get("wall_s")
    if isinstance(ended, int | float) and ended > 0 and begins:  # what comes after is the drawing of reports
        bars = [b for b in bars if b.start_s < begins[-1] + ended]
    if len(parts) > 1:
        remarks.append(f"resumed {len(parts) - 1} times; the parts are shown one after another")
    if parts and not any(n.kind == "plan" for n in notes):
        remarks.append("the ledger has no plans: what was retained is not known")
    if not report:
        remarks.append("the run did not come to its end: this is what its ledger has")
    path = folder / "config.yaml"
    config = regular.read_bytes(path).decode(errors="replace") if path.is_file() else ""
    began = parts[0].began if parts else 0.0
    bars.sort(key=lambda b: (b.start_s, b.end_s))
    return RunRecord(folder, began, bars, notes, stages, report, config, tuple(begins), remarks)


def _ledgers(folder: Path) -> list[Path]:
    """Return the ledgers of a run in order: those of the parts before each resumption, then the last."""
    found = [
        (int(m[1]), p)
        for p in folder.glob("ledger.*.jsonl")
        if (m := re.fullmatch(r"ledger\.(\d+)\.jsonl", p.name))
    ]
    last = folder / "ledger.jsonl"
    return [p for _, p in sorted(found)] + ([last] if last.exists() else [])


def _read_ledger(path: Path) -> Records:
    try:
        return read_records(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}; cut the file before that line to show the rest") from error


def _read_report(path: Path, remarks: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        report = json.loads(regular.read_text(path))
    except (OSError, ValueError) as error:
        remarks.append(f"report.json cannot be read ({error}); the ledger is shown alone")
        return {}
    return _in_shape(_mapping(report))


def _in_shape(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a report with the parts that are tables as tables, whatever wrote it."""
    stages = report.get("stages")
    tables = {key: _mapping(report.get(key)) for key in _TABLES if key in report}
    listed = [s for s in stages if isinstance(s, Mapping)] if isinstance(stages, list) else []
    return {**report, **tables, "stages": listed} if report else {}


def _resolve(part: Records, report: Mapping[str, Any], stages: dict[str, Mapping[str, Any]]) -> list[Bar]:
    """Return a ledger's spans as bars, naming stages and what is retained by the plan in force."""
    plans = [(n.at_s, n.value) for n in part.notes if n.kind == "plan" and _is_plan(n.value)]
    for _, plan in plans:
        for stage in plan["stages"]:
            stages[stage["name"]] = stage
    reported = [str(s.get("name")) for s in report.get("stages") or ()]
    begins = [at for at, _ in plans]
    known: dict[tuple[int, int], tuple[str, list[int], set[int]]] = {}
    for k, (_, plan) in enumerate(plans):
        for i, stage in enumerate(plan["stages"]):
            known[k, i] = (stage["name"], stage["order"], set(stage["retained"]))
    bars = []
    for span in part.spans:
        stage, retained = "", False
        if span.visit is not None:
            k = max(0, bisect_right(begins, span.start_s) - 1)
            if (k, span.visit.stage) in known:
                stage, order, kept = known[k, span.visit.stage]
                at = span.visit.position
                retained = (order[at] if at < len(order) else at - len(order)) in kept
            else:
                stage = _name_of(span, reported)
            stages.setdefault(stage, {})
        passed = span.visit.pass_index if span.visit is not None else -1
        bars.append(
            Bar(
                span.thread,
                span.kind,
                span.start_s,
                span.end_s,
                span.label,
                stage,
                passed,
                retained,
                span.nbytes,
            )
        )
    return bars


def _name_of(span: Span, reported: Sequence[str]) -> str:
    assert span.visit is not None
    i = span.visit.stage
    return reported[i] if i < len(reported) else f"stage {i}"


def _is_plan(value: Any) -> bool:
    """Return whether a note has the plan's parts that a report uses."""
    try:
        return all(
            isinstance(s["name"], str) and _are_numbers(s["order"]) and _are_numbers(s["retained"])
            for s in value["stages"]
        )
    except (KeyError, TypeError):
        return False


def _are_numbers(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) for x in value) and length in (None, len(value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
