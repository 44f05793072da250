"""Where every second went: an append-only list of spans, written as JSON lines.

The compute thread is a `Track`: each `mark` closes the span since the one before, so its spans tile
the run. `unaccounted` compares them with a wall time measured apart. Notes are what a report needs
besides: plans, memory, steps of a sampler.

The file has all of them. Memory has totals of all and the last of each stage: a run of millions of passes
holds no more than one of thousands.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from blockstream.plan.segments import Visit
from blockstream.system import regular

from .spans import MOST_SPANS, Span, Spans

SCHEMA = 1

#: The most bytes of a line: a plan of ten thousand segments takes a tenth of it.
_LONGEST = 16 << 20

#: A killed run loses no more than its last seconds.
FLUSH_S = 2.0

#: The notes that are kept in memory at most.
MOST_NOTES = 1 << 12
#: What waits for the file at most.
_MOST_UNWRITTEN = 1 << 10

#: The kinds of span, by thread. compute: "execute" a segment's forward, "stall" compute waiting for a
#: load, "outside" everything between segments, "replan". loader: "load", "idle". Over a device: uploader:
#: "fetch" a segment in host memory and issue its copy, "idle"; link: "copy"; device: "compute", "wait".
KINDS = ("execute", "stall", "outside", "replan", "load", "idle", "fetch", "copy", "compute", "wait")


class Note(NamedTuple):
    """Something that was so at one moment: a "plan", "memory", a "step" of a sampler. Plain JSON values."""

    kind: str
    at_s: float
    value: Any


class Records(NamedTuple):
    """What a ledger file holds; `began` in seconds since 1970."""

    began: float
    spans: list[Span]
    notes: list[Note]


class Ledger:
    """All spans of a run; `path` is written as the run goes, so that a killed run leaves its own.

    `add`, `note` and `flush` may be called from any thread. Times come from `clock`, seconds that never
    go back. `spans` and `notes` are the last of each, `most_spans` and `most_notes` at most; `all_spans` and
    `all_notes` read what is older from the file.
    """

    def __init__(
        self,
        path: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        most_spans: int = MOST_SPANS,
        most_notes: int = MOST_NOTES,
    ) -> None:
        self.spans = Spans(most_spans)
        self.notes: deque[Note] = deque(maxlen=most_notes)
        self._clock = clock
        self._begin = clock()
        self._began = time.time()
        self.path: Path | None = None
        self._file: IO[str] | None = None
        self._writing, self._adding = threading.Lock(), threading.Lock()
        #: What is not in the file yet.
        self._unwritten: list[Span] = []
        self._untold: list[Note] = []
        self._noted = 0
        self._flushed_s = 0.0
        #: The compute thread's track, from the first moment of the ledger.
        self.compute = Track(self, "compute")
        if path is not None:
            self.write_to(path)

    def write_to(self, path: Path) -> None:
        """Write to a file from now on, beginning with what there is; its first line is there at once."""
        file = path.open("w", encoding="utf-8")
        file.write(json.dumps({"schema": SCHEMA, "began": self._began}) + "\n")
        with self._adding:
            self.path, self._file = path, file
            self._unwritten, self._untold = list(self.spans), list(self.notes)
        self.flush()

    def now(self) -> float:
        """Return the seconds since the ledger began."""
        return self._clock() - self._begin

    def add(self, span: Span) -> None:
        """Append a span; about once in `FLUSH_S` seconds, write what has come together."""
        with self._adding:
            self.spans.append(span)
            if self._file is None:
                return
            self._unwritten.append(span)
            due = len(self._unwritten) >= _MOST_UNWRITTEN or span.end_s - self._flushed_s >= FLUSH_S
        if due:
            self.flush()

    def note(self, kind: str, value: Any) -> None:
        """Append what is so now; `value` is plain JSON."""
        note = Note(kind, self.now(), value)
        with self._adding:
            self.notes.append(note)
            self._noted += 1
            if self._file is not None:
                self._untold.append(note)

    def all_spans(self) -> Iterator[Span]:
        """Yield every span there was, oldest first; without a file, or where it is gone, those still kept."""
        if not self.spans.dropped:
            return iter(self.spans)
        rows = self._from_file()
        return iter(self.spans) if rows is None else (row for row in rows if isinstance(row, Span))

    def all_notes(self) -> Iterator[Note]:
        """Yield every note there was, as `all_spans` does spans."""
        if self._noted <= len(self.notes):
            return iter(list(self.notes))
        rows = self._from_file()
        return iter(list(self.notes)) if rows is None else (row for row in rows if isinstance(row, Note))

    def unaccounted(self, wall_s: float) -> float:
        """Return the share of the wall time so far that the compute thread's spans do not cover, 0..1."""
        return max(0.0, 1.0 - self.spans.covered_s("compute") / wall_s) if wall_s > 0 else 0.0

    def _from_file(self) -> Iterator[Span | Note] | None:
        """Return the rows of the file, None where there is none that can be read."""
        if self.path is None:
            return None
        self.flush()
        with suppress(OSError, ValueError):
            began_of(self.path)
            return read_rows(self.path)
        return None

    def track(self, thread: str) -> Track:
        """Return a track whose first span begins now."""
        return Track(self, thread)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the compute thread does outside segments for the length of the block."""
        before = self.compute.phase
        self.compute.mark("outside")
        self.compute.phase = name
        try:
            yield
        finally:
            self.compute.mark("outside")
            self.compute.phase = before

    def flush(self, sync: bool = False) -> None:
        """Write the spans and notes that are not in the file yet; with `sync`, to the disk itself."""
        with self._writing:
            if self._file is None:
                return
            with self._adding:
                spans, notes, self._unwritten, self._untold = self._unwritten, self._untold, [], []
                self._flushed_s = self.now()
            try:
                self._file.writelines(_dump(s) + "\n" for s in spans)
                self._file.writelines(_dump_note(n) + "\n" for n in notes)
                self._file.flush()
            except BaseException:
                with self._adding:
                    self._unwritten[:0], self._untold[:0] = spans, notes
                raise
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left and close the file."""
        try:
            self.flush()
        finally:
            with self._writing:
                if self._file is not None:
                    self._file.close()
                    self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Track:
    """The spans of one thread, without a gap: `mark` closes the span that began at the last mark.

    `phase` labels spans that have no label of their own. One that is not `kept` leaves none in the ledger.
    """

    def __init__(self, ledger: Ledger, thread: str, kept: bool = True) -> None:
        self._ledger = ledger
        self._kept = kept
        self._thread = thread
        self.phase = ""
        self.at = ledger.now()

    def mark(self, kind: str, label: str = "", visit: Visit | None = None, nbytes: int = 0) -> Span:
        """Record what the thread did since the last mark."""
        now = self._ledger.now()
        span = Span(self._thread, kind, self.at, now, label or self.phase, visit, nbytes)
        if self._kept:
            self._ledger.add(span)
        self.at = now
        return span


def unaccounted(spans: Iterable[Span], wall_s: float, thread: str = "compute") -> float:
    """Return the share of `wall_s` that the spans of a thread do not cover, 0..1.

    Spans that overlap one another count once; what comes after `wall_s` does not count.
    """
    covered, upto = 0.0, -inf
    for start_s, end_s in sorted((s.start_s, s.end_s) for s in spans if s.thread == thread):
        covered += max(0.0, min(end_s, wall_s) - max(start_s, upto))
        upto = max(upto, end_s)
    return max(0.0, 1.0 - covered / wall_s) if wall_s > 0 else 0.0


def read_records(path: Path) -> Records:
    """Return what a ledger file holds: see `read_rows`."""
    found = Records(began_of(path), [], [])
    for row in read_rows(path):
        if isinstance(row, Span):
            found.spans.append(row)
        else:
            found.notes.append(row)
    return found


def began_of(path: Path) -> float:
    """Return when a ledger file was begun, in seconds since 1970. Raises ValueError if it is none."""
    with regular.opened(path) as file:
        line = file.readline(_LONGEST)
    if not line.endswith(b"\n"):
        raise ValueError(f"{path}: not a ledger, it has no complete line")
    header = _header(line)
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path}, line 1: not a ledger of schema {SCHEMA}: {_shown(line)}")
    began = header.get("began")
    return float(began) if isinstance(began, int | float) else 0.0


def read_rows(path: Path) -> Iterator[Span | Note]:
    """Yield what a ledger file holds, line by line; what a kill or a power cut left at its end is left out.

    Raises ValueError naming the line that cannot be read, if others follow that can.
    """
    began_of(path)
    wrong = ""
    with regular.opened(path) as file:
        file.readline(_LONGEST)
        n = 1
        while line := file.readline(_LONGEST):
            n += 1
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("it was cut")
                row = _row(json.loads(line, parse_constant=_no_number))
            except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
                wrong = wrong or f"{path}, line {n}: neither a span nor a note: {_shown(line)}"
                continue
            if wrong:
                raise ValueError(wrong)
            yield row


def _row(row: Any) -> Span | Note:
    if isinstance(row, dict):
        return Note(str(row["note"]), float(row["at"]), row["value"])
    return _load(row)


def _shown(line: bytes) -> str:
    return repr(line.rstrip(b"\n")[:80].decode(errors="replace"))


def _no_number(name: str) -> None:
    """Read NaN and the infinities as nothing: no time is one, and no report can be."""


def _header(line: bytes) -> dict[str, object]:
    try:
        header = json.loads(line)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _dump(span: Span) -> str:
    visit = list(span.visit) if span.visit is not None else None
    row = [
        span.thread,
        span.kind,
        round(span.start_s, 7),
        round(span.end_s, 7),
        span.label,
        visit,
        span.nbytes,
    ]
    return json.dumps(row, separators=(",", ":"))


def _dump_note(note: Note) -> str:
    row = {"note": note.kind, "at": round(note.at_s, 7), "value": note.value}
    return json.dumps(row, separators=(",", ":"))


def _load(row: list[object]) -> Span:
    thread, kind, start, end, label, visit, nbytes = row
    at = Visit(*visit) if isinstance(visit, list) else None
    return Span(str(thread), str(kind), float(start), float(end), str(label), at, int(nbytes))  # type: ignore[arg-type, call-overload]
