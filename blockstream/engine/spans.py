"""Timed intervals of a run's threads: all in totals, the last of them one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from math import inf
from struct import Struct
from typing import Any, NamedTuple, overload

from blockstream.plan.segments import Visit

#: What is kept in memory at most, in 40 bytes each.
MOST_SPANS = 1 << 15


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


class Total(NamedTuple):
    """All spans of one thread, kind, label and stage (None outside the visits), however many they are.

    `begin_s` and `end_s` are the first's and the last's; `passes` is the last pass's index and one.
    """

    thread: str
    kind: str
    label: str
    stage: int | None
    number: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    begin_s: float = inf
    end_s: float = 0.0
    passes: int = 0


class Spans(Sequence[Span]):
    """Spans in 40 bytes each, `most` of them at most: of each stage the last, and totals of all there were.

    `append` is safe from any thread.
    """

    _ROW = Struct("<2dq3iI")
    #: Rows that are copied at once to be read: a row may be added meanwhile.
    _CHUNK = 4096

    def __init__(self, most: int = MOST_SPANS) -> None:
        self._most = most
        self._rows = bytearray()
        self._lock = threading.Lock()
        #: What spans have in common: thread, kind, label, and whether there is a visit.
        self._common: list[tuple[str, str, str, bool]] = []
        self._codes: dict[tuple[str, str, str, bool], int] = {}
        #: By code and stage (-1: none): count, seconds, nbytes, begin_s, end_s, passes.
        self._totals: dict[tuple[int, int], tuple[int, float, int, float, float, int]] = {}
        #: By thread: the seconds its spans cover, and up to when.
        self._covered: dict[str, tuple[float, float]] = {}
        #: How many spans are not kept any more.
        self.dropped = 0

    def append(self, span: Span) -> None:
        """Add a span."""
        thread, kind, start_s, end_s, label, visit, nbytes = span
        common = (thread, kind, label, visit is not None)
        with self._lock:
            code = self._codes.setdefault(common, len(self._common))
            if code == len(self._common):
                self._common.append(common)
            self._rows += self._ROW.pack(start_s, end_s, nbytes, *(visit or (0, 0, 0)), code)
            covered, upto = self._covered.get(thread, (0.0, -inf))
            self._covered[thread] = covered + max(0.0, end_s - max(start_s, upto)), max(upto, end_s)
            at = (code, visit.stage if visit is not None else -1)
            n, seconds, total, begin, end, passes = self._totals.get(at, (0, 0.0, 0, inf, 0.0, 0))
            if visit is not None:
                passes = max(passes, visit.pass_index + 1)
            self._totals[at] = (
                *(n + 1, seconds + end_s - start_s, total + nbytes),
                *(min(begin, start_s), max(end, end_s), passes),
            )
            if len(self._rows) >= self._most * self._ROW.size:
                self._thin()

    @property
    def totals(self) -> list[Total]:
        """Return what all spans come to, kept or not."""
        with self._lock:
            found = list(self._totals.items())
        totals = []
        for (code, stage), (number, seconds, nbytes, begin_s, end_s, passes) in found:
            about = (*self._common[code][:3], stage if stage >= 0 else None)
            totals.append(Total(*about, number, seconds, nbytes, begin_s, end_s, passes))
        return totals

    def covered_s(self, thread: str) -> float:
        """Return the seconds that a thread's spans cover, kept or not; what overlaps counts once."""
        return self._covered.get(thread, (0.0, 0.0))[0]

    def _thin(self) -> None:
        """Keep half as many as there may be: the last of each stage, and of what is outside the visits."""
        rows, size = self._rows, self._ROW.size
        left = dict.fromkeys({stage for _, stage in self._totals}, 0)
        left = dict.fromkeys(left, self._most // 2 // len(left))
        kept = []
        for at in range(len(rows) - size, -1, -size):
            *_, stage, _, _, code = self._ROW.unpack_from(rows, at)
            stage = stage if self._common[code][3] else -1
            if left[stage]:
                left[stage] -= 1
                kept.append(at)
        self.dropped += len(rows) // size - len(kept)
        # Whoever reads the rows goes on with those that there were.
        self._rows = bytearray().join(rows[at : at + size] for at in reversed(kept))

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
        begin, size, rows = 0, self._ROW.size, self._rows
        while chunk := bytes(rows[begin : begin + self._CHUNK * size]):
            yield from map(self._span, self._ROW.iter_unpack(chunk))
            begin += len(chunk)

    def _span(self, row: tuple[Any, ...]) -> Span:
        start_s, end_s, nbytes, *visit, code = row
        thread, kind, label, visited = self._common[code]
        return Span(thread, kind, start_s, end_s, label, Visit(*visit) if visited else None, nbytes)
