"""What a sweep has come to: a line for each run, in parts that are written as it goes, and their totals."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .place import Place

FOLDER = "results"
#: A part is written when it has so many lines, or when its first line is so old.
PART_LINES = 1000
PART_S = 30.0
#: Failed runs that a report names.
NAMED = 100


class Results:
    """The lines of a sweep, each run's kept once: in `results/*.jsonl` of its place.

    Two sweeps of one folder write parts of different names, so neither loses the other's.
    """

    def __init__(self, place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        self.place, self._clock = place, clock
        self._session = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
        self._lines: list[str] = []
        self._parts = 0
        self._since_s = 0.0

    def read(self) -> Iterator[Mapping[str, Any]]:
        """Yield the lines of all parts there are; one that was cut is left out, its run is asked again."""
        for name in self.place.names(FOLDER):
            for text in (self.place.read(f"{FOLDER}/{name}") or b"").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("run"), str):
                    yield line

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep a line; write the part if it is full or old."""
        if not self._lines:
            self._since_s = self._clock()
        self._lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if len(self._lines) >= PART_LINES or self._clock() - self._since_s >= PART_S:
            self.flush()

    def flush(self) -> None:
        """Write the lines that no part has yet."""
        if self._lines:
            data = "".join(self._lines).encode()
            self.place.write(f"{FOLDER}/{self._session}-{self._parts:06d}.jsonl", data)
            self._parts += 1
            self._lines = []


class Totals:
    """The sums over a sweep's lines: a run counts once, and as done once it is done, whatever came before."""

    def __init__(self, runs: int, prompts: int) -> None:
        self.runs, self.prompts = runs, prompts
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.prompts_done = 0
        self.resumed = 0
        self.wall_s = 0.0
        self.read_nbytes = 0
        self.peak_nbytes = 0
        self.exceeded = 0
        self.where: dict[str, int] = {}

    def add(self, line: Mapping[str, Any]) -> bool:
        """Count a line; return False for one of a run that has counted."""
        name = str(line["run"])
        if name in self.done:
            return False
        if "error" in line:
            self.failed[name] = str(line["error"])
            return True
        self.failed.pop(name, None)
        self.done.add(name)
        self.prompts_done += len(line.get("prompts") or ())
        self.resumed += int(line.get("parts") or 1) > 1
        self.wall_s += float(line.get("wall_s") or 0)
        self.read_nbytes += int(line.get("read_nbytes") or 0)
        self.peak_nbytes = max(self.peak_nbytes, int(line.get("peak_nbytes") or 0))
        self.exceeded += line.get("held") is False
        where = str(line.get("where") or "")
        self.where[where] = self.where.get(where, 0) + 1
        return True

    def account(self) -> dict[str, Any]:
        """Return what the sweep's report.json says of them."""
        failed = sorted(self.failed.items())
        return {
            "runs": self.runs,
            "done": len(self.done),
            "failed": len(failed),
            "left": self.runs - len(self.done) - len(failed),
            "prompts": self.prompts,
            "prompts_done": self.prompts_done,
            "resumed": self.resumed,
            "wall_s": self.wall_s,
            "read_nbytes": self.read_nbytes,
            "peak_nbytes": self.peak_nbytes,
            "budget_exceeded": self.exceeded,
            "where": self.where,
            "failures": [{"run": name, "error": error} for name, error in failed[:NAMED]],
        }
