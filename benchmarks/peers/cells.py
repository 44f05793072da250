"""The grid of runs, which of them are done, and which peer came nearest: pure but for a folder of results."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.peers.ways import OURS, WAYS

#: The budget of the full column, and those that only the leaders run at.
MAIN, TRIALS = "3.3GiB", 3
OTHERS = ("1.5GiB", "6GiB", "unlimited")
MODELS = ("t5", "stdit3", "llama", "dit")
#: Compute with all weights in memory: what bounds a pass, and what streaming must be level with.
REFERENCE = "resident"
AUTO, RIVAL = "blockstream auto", "accelerate"


@dataclass(frozen=True)
class Cell:
    """One run: a network, a budget, a contestant, which trial."""

    model: str
    budget: str
    way: str
    trial: int = 0

    @property
    def id(self) -> str:
        return f"{self.model}/{self.budget}/{self.way}/{self.trial}"

    @property
    def file(self) -> str:
        return self.id.replace("/", "--").replace(" ", "_") + ".json"

    @property
    def row(self) -> Cell:
        """Return the cell that stands for all trials."""
        return Cell(self.model, self.budget, self.way)


Found = dict[Cell, dict[str, Any]]


def main_column() -> list[Cell]:
    """Return the cells of the full column, and the reference, contestant by contestant."""
    cells = [Cell(m, "unlimited", REFERENCE) for m in MODELS]
    ways = [way for way in WAYS if way != REFERENCE]
    return cells + [Cell(m, MAIN, way, n) for way in ways for m in MODELS for n in range(TRIALS)]


def other_columns(found: Found, trial: int = 0) -> list[Cell]:
    """Return the cells at the other budgets: ours, accelerate and the fastest other of the full column.

    Which that is, is known when a model's full column is done. Further trials have the reference's too.
    """
    cells = [Cell(m, "unlimited", REFERENCE, trial) for m in MODELS if trial]
    open_models = {cell.model for cell in missing(found, main_column())}
    for model in MODELS:
        best = None if model in open_models else best_other(found, model)
        ways = [AUTO, RIVAL, *([best] if best else [])]
        cells += [Cell(model, budget, way, trial) for way in ways for budget in OTHERS]
    # One environment at a time: contestant by contestant, as in the full column.
    return sorted(cells, key=lambda cell: list(WAYS).index(cell.way))


def pairs(found: Found, rival: Cell, count: int) -> list[Cell]:
    """Return `count` further trials of ours and of a rival's row in turn, one first and then the other."""
    rows = [replace(rival, way=AUTO), rival]
    first = 1 + max((cell.trial for cell in found if cell.row in rows), default=-1)
    trials = range(first, first + count)
    return [replace(row, trial=n) for n in trials for row in (rows if n % 2 else reversed(rows))]


def missing(found: Found, cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells that are still to be run: after a failure the other trials are not."""
    return [c for c in cells if c not in found and "failed" not in found.get(c.row, {})]


def best_other(found: Found, model: str) -> str | None:
    """Return the fastest peer of the full column beside accelerate, None where none could run."""
    rows = {
        row.way: pass_s(trials)
        for row, trials in by_row(found).items()
        if row.model == model and row.budget == MAIN
    }
    times = {w: s for w, s in rows.items() if s is not None and w not in (*OURS, RIVAL, REFERENCE)}
    return min(times, key=lambda w: times[w]) if times else None


def by_row(found: Found) -> dict[Cell, list[dict[str, Any]]]:
    """Return the trials of each row, in their order."""
    rows: dict[Cell, list[dict[str, Any]]] = {}
    for cell in sorted(found, key=lambda c: c.trial):
        rows.setdefault(cell.row, []).append(found[cell])
    return rows


def steady_s(facts: dict[str, Any]) -> float:
    """Return a run's time per pass, the first and the last left out."""
    return steady(facts["passes_s"])


def steady(passes: Sequence[float]) -> float:
    """Return the median without the first pass, which fills what is kept, and the last.

    What prefetches for a next pass has less to read in the last one: it would flatter us.
    """
    return float(statistics.median(passes[1:-1] or passes))


def pass_s(trials: Iterable[dict[str, Any]]) -> float | None:
    """Return the median time per pass of the trials that ran, None if none did."""
    times = [steady_s(t) for t in trials if "failed" not in t]
    return statistics.median(times) if times else None


class Results:
    """A folder with a JSON file a cell, written when the cell is done: what is there is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> Found:
        """Return all cells done."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            kept = json.loads(path.read_text())
            found[Cell(**kept["cell"])] = kept["facts"]
        return found

    def write(self, cell: Cell, facts: dict[str, Any]) -> None:
        """Keep a cell; one that is written half is not there."""
        path = self.folder / cell.file
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"cell": vars(cell), "facts": facts}, indent=1) + "\n")
        os.replace(part, path)

    def run(
        self,
        cells: Iterable[Cell],
        execute: Callable[[Cell], dict[str, Any]],
        only: Iterable[str] = ("*",),
        retry: bool = False,
        may_begin: Callable[[], bool] = lambda: True,
    ) -> list[Cell]:
        """Run what is not done of the cells that match a pattern; return those left when time was over.

        A failure is a result: its cell is run again only with `retry`. Trials after one that failed are
        not run at all, for they would fail as it did.
        """
        patterns = list(only)
        left: list[Cell] = []
        for cell in cells:
            done = self.read()
            if not any(fnmatch(cell.id, p) for p in patterns):
                continue
            again = retry and "failed" in done.get(cell, {})
            if not again and not missing(done, [cell]):
                continue
            if left or not may_begin():
                left.append(cell)
                continue
            self.write(cell, execute(cell))
        return left
