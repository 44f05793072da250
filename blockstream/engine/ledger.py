"""Where every second went: an append-only list of spans, written as JSON lines.

The compute thread is a `Track`: each `mark` closes the span since the one before, so its spans tile
the run. `unaccounted` compares them with a wall time measured apart. Notes are what a report needs
besides: plans, memory, steps of a sampler.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import IO, Any, NamedTuple, overload

from blockstream.plan.segments import Visit
from blockstream.system import regular

SCHEMA = 1

#: The most bytes of a line: a plan of ten thousand segments takes a tenth of it.
_LONGEST = 16 << 20

#: A killed run loses no more than its last seconds.
FLUSH_S = 2.0

#: The kinds of span, by thread. compute: "execute" a segment's forward, "stall" compute waiting for a
#: load, "outside" everything between segments, "replan". loader: "load", "idle". link: "copy", "idle".
KINDS = ("execute", "stall", "outside", "replan", "load", "idle", "copy")


class Span(NamedTuple):
    """One timed interval of one thread, in seconds since the ledger began.

    `label` is the segment's name for loads and visits, the phase's for what is outside; `nbytes` the
    bytes read.
    """

    thread: str
    kind: str
    start_s: float
    end_s: float
    label: str = ""
    visit: Visit | None = None
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        """Return the length of the span."""
        return self.end_s - self.start_s


class Spans(Sequence[Span]):
    """Spans in 40 bytes each: a run of thousands of passes has millions. `append` is safe from any thread."""

    _ROW = Struct("<2dq3iI")
    #: Rows that are copied at once to be read: a row may be added meanwhile.
    _CHUNK = 4096

    def __init__(self) -> None:
        self._rows = bytearray()
        self._lock = threading.Lock()
        #: What spans have in common: thread, kind, label, and whether there is a visit.
        self._common: list[tuple[str, str, str, bool]] = []
        self._codes: dict[tuple[str, str, str, bool], int] = {}

    def append(self, span: Span) -> None:
        """Add a span."""
        thread, kind, start_s, end_s, label, visit, nbytes = span
        common = (thread, kind, label, visit is not None)
        with self._lock:
            code = self._codes.setdefault(common, len(self._common))
            if code == len(self._common):
                self._common.append(common)
            self._rows += self._ROW.pack(start_s, end_s, nbytes, *(visit or (0, 0, 0)), code)

    def __len__(self) -> int:
        return len(self._rows) // self._ROW.size

    @overload
    def __getitem__(self, at: int) -> Span: ...

    @overload
    def __getitem__(self, at: slice) -> list[Span]: ...

    def __getitem__(self, at: int | slice) -> Span | list[Span]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        begin = range(len(self))[at] * self._ROW.size
        return self._span(self._ROW.unpack_from(self._rows, begin))

    def __iter__(self) -> Iterator[Span]:
        begin, size = 0, self._ROW.size
        while rows := bytes(self._rows[begin : begin + self._CHUNK * size]):
            yield from map(self._span, self._ROW.iter_unpack(rows))
            begin += len(rows)

    def _span(self, row: tuple[Any, ...]) -> Span:
        start_s, end_s, nbytes, *visit, code = row
        thread, kind, label, visited = self._common[code]
        return Span(thread, kind, start_s, end_s, label, Visit(*visit) if visited else None, nbytes)


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
    go back.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spans = Spans()
        self.notes: list[Note] = []
        self._clock = clock
        self._begin = clock()
        self._began = time.time()
        self.path: Path | None = None
        self._file: IO[str] | None = None
        self._writing = threading.Lock()
        self._written = self._noted = 0
        self._flushed_s = 0.0
        #: The compute thread's track, from the first moment of the ledger.
        self.compute = Track(self, "compute")
        if path is not None:
            self.write_to(path)

    def write_to(self, path: Path) -> None:
        """Write to a file from now on, beginning with what there is; its first line is there at once."""
        self.path = path
        self._file = path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"schema": SCHEMA, "began": self._began}) + "\n")
        self.flush()

    def now(self) -> float:
        """Return the seconds since the ledger began."""
        return self._clock() - self._begin

    def add(self, span: Span) -> None:
        """Append a span; about once in `FLUSH_S` seconds, write what has come together."""
        self.spans.append(span)
        if self._file is not None and span.end_s - self._flushed_s >= FLUSH_S:
            self.flush()

    def note(self, kind: str, value: Any) -> None:
        """Append what is so now; `value` is plain JSON."""
        self.notes.append(Note(kind, self.now(), value))

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
            spans, notes = self.spans[self._written :], self.notes[self._noted :]
            self._file.writelines(_dump(s) + "\n" for s in spans)
            self._file.writelines(_dump_note(n) + "\n" for n in notes)
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
            self._written += len(spans)
            self._noted += len(notes)
            self._flushed_s = self.now()

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
    covered, upto = 0.0, float("-inf")
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
