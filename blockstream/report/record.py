"""A run's folder read back: its ledgers, report and config, as far as they are there.

A killed run has no report, an older version's ledger no notes, a resumed run several ledgers: what is
missing is said in `remarks`, and the rest is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blockstream.engine.ledger import Note
from blockstream.errors import ConfigError
from blockstream.report.sampling import Steps, samplings
from blockstream.system import regular

from .bars import Bar, Sample
from .parts import Part, are_numbers

#: What is shown of a result.
_SUFFIXES = (".mp4", ".png")
_PICTURES = ("timeline.png", "compare.png")
#: The first line of a ledger is no longer than this.
_BLANK_NBYTES = 1 << 16
#: The parts of a report that are tables.
_TABLES = ("budget", "disk", "energy", "attention", "output", "versions")
#: What a report says of each larger budget.
_GAINS = {"budget_nbytes", "more_nbytes", "saves_s", "saves_read_nbytes"}


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
    #: The seconds that each stage computed.
    executed: Mapping[str, float] = field(default_factory=dict)

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
            if note.kind == "memory" and are_numbers(note.value, 2):
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
    parts = [part for path in ledgers if (part := _part(path, remarks)) is not None]
    bars: list[Bar] = []
    notes: list[Note] = []
    stages: dict[str, Mapping[str, Any]] = {}
    executed: dict[str, float] = {}
    offset_s = 0.0
    begins = []
    for part in parts:
        begins.append(offset_s)
        resolved = part.bars(report, stages, executed)
        bars += [b._replace(start_s=b.start_s + offset_s, end_s=b.end_s + offset_s) for b in resolved]
        notes += [n._replace(at_s=n.at_s + offset_s) for n in part.notes]
        offset_s = max([offset_s, *(b.end_s for b in bars)])
    ended = report.get("wall_s")
    if isinstance(ended, int | float) and ended > 0 and begins:  # what comes after is the drawing of reports
        bars = [b for b in bars if b.start_s < begins[-1] + ended]
    if any(part.is_merged for part in parts):
        spans = sum(part.spans for part in parts)
        remarks.append(f"of {spans:,} spans those between the first passes and the last are shown merged")
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
    return RunRecord(folder, began, bars, notes, stages, report, config, tuple(begins), remarks, executed)


def _ledgers(folder: Path) -> list[Path]:
    """Return the ledgers of a run in order: those of the parts before each resumption, then the last."""
    found = [
        (int(m[1]), p)
        for p in folder.glob("ledger.*.jsonl")
        if (m := re.fullmatch(r"ledger\.(\d+)\.jsonl", p.name))
    ]
    last = folder / "ledger.jsonl"
    return [p for _, p in sorted(found)] + ([last] if last.exists() else [])


def _part(path: Path, remarks: list[str]) -> Part | None:
    """Return what a ledger holds; None, and a remark, for one that has not one whole line."""
    try:
        return Part(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}; move it away to see the rest") from error
    except ValueError as error:
        if _is_blank(path):
            remarks.append(f"{path.name} was cut in its first line: nothing is known of that part")
            return None
        raise ConfigError(f"{error}; cut the file before that line to show the rest") from error


def _is_blank(path: Path) -> bool:
    """Return whether a ledger was cut in its first line."""
    if not path.is_file() or path.stat().st_size > _BLANK_NBYTES:
        return False
    data = regular.read_bytes(path, _BLANK_NBYTES)
    head = b'{"schema":'
    return b"\n" not in data and (data.startswith(head) or head.startswith(data) or not data.strip(b"\0"))


def _read_report(path: Path, remarks: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        report = regular.read_json(path)
    except (OSError, ValueError) as error:
        remarks.append(f"report.json cannot be read ({error}); the ledger is shown alone")
        return {}
    return _in_shape(_mapping(report))


def _in_shape(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a report with the parts that are tables as tables, whatever wrote it."""
    stages = report.get("stages")
    tables = {key: _mapping(report.get(key)) for key in _TABLES if key in report}
    listed = [s for s in stages if isinstance(s, Mapping)] if isinstance(stages, list) else []
    larger = report.get("larger")
    told = isinstance(larger, list) and all(isinstance(x, Mapping) and x.keys() >= _GAINS for x in larger)
    return {**report, **tables, "stages": listed, "larger": larger if told else None} if report else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
