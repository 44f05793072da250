"""Each pass of a run: its times, what it read, the sampler's step that it was."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .record import RunRecord


@dataclass
class PassRow:
    """One pass. `load_s` and `nbytes` are of loads for its visits; `step`, `to` and `cosine` of a sampler."""

    stage: str
    pass_index: int
    begin_s: float
    end_s: float
    execute_s: float = 0.0
    stall_s: float = 0.0
    load_s: float = 0.0
    nbytes: int = 0
    step: int | None = None
    to: int | None = None
    cosine: float | None = None

    @property
    def wall_s(self) -> float:
        """Return the seconds from its first wait to the end of its last visit."""
        return self.end_s - self.begin_s


def pass_rows(record: RunRecord) -> list[PassRow]:
    """Return the passes in the order they began."""
    rows: dict[tuple[str, int, int], PassRow] = {}
    for bar in record.bars:
        if not bar.stage or bar.pass_index < 0 or bar.kind not in ("execute", "stall"):
            continue
        # A resumed run counts its passes from 0 again.
        key = (bar.stage, bisect_right(record.parts, bar.start_s), bar.pass_index)
        row = rows.setdefault(key, PassRow(bar.stage, bar.pass_index, bar.start_s, bar.end_s))
        row.end_s = max(row.end_s, bar.end_s)
        if bar.kind == "execute":
            row.execute_s += bar.seconds
        else:
            row.stall_s += bar.seconds
    _add_loads(record, rows)
    found = sorted(rows.values(), key=lambda r: r.begin_s)
    _add_steps(record, found)
    return found


def _add_loads(record: RunRecord, rows: Mapping[tuple[str, int, int], PassRow]) -> None:
    by_pass: dict[tuple[str, int], list[PassRow]] = {}
    for (stage, _, pass_index), row in rows.items():
        by_pass.setdefault((stage, pass_index), []).append(row)
    for bar in record.bars:
        if bar.kind == "load" and (candidates := by_pass.get((bar.stage, bar.pass_index))):
            # The load came before the end of its pass: the first that ends after it.
            row = next((r for r in candidates if r.end_s >= bar.end_s), candidates[-1])
            row.load_s += bar.seconds
            row.nbytes += bar.nbytes


def _add_steps(record: RunRecord, rows: list[PassRow]) -> None:
    """Give each step of a sampler to the pass that ended last before it."""
    ends = [r.end_s for r in rows]
    for note in record.notes:
        if note.kind != "step" or not isinstance(note.value, Mapping):
            continue
        k = bisect_right(ends, note.at_s + 1e-6) - 1
        if k >= 0:
            value: Mapping[str, Any] = note.value
            rows[k].step, rows[k].to, rows[k].cosine = value.get("i"), value.get("to"), value.get("cosine")
