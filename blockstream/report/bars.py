"""What a timeline is made of: spans resolved to stages and segments, samples of memory; many become few."""

from __future__ import annotations

from typing import NamedTuple


class Bar(NamedTuple):
    """One span, resolved: the stage by name, the segment by name, whether the plan retained it then.

    `pass_index` -1: outside any pass, or several spans of several passes as one.
    """

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


class Merger:
    """Takes bars in the order they begin; neighbours of one thread, stage and kind become one.

    A merged bar spans what it stands for, at most eight times `gap_s`, and says of how many; gaps up to
    `gap_s` between them are closed.
    """

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._found: list[Bar] = []
        self._counts: list[int] = []
        self._last: dict[tuple[str, str, str, bool], int] = {}

    def add(self, bar: Bar, alone: bool = False) -> None:
        """Take in a bar; one that stays `alone` is merged with none."""
        key = (bar.thread, bar.kind, bar.stage, bar.retained)
        at = None if alone else self._last.get(key)
        if at is not None and self._is_near(bar, self._found[at]):
            merged = self._found[at]
            end_s, nbytes = max(merged.end_s, bar.end_s), merged.nbytes + bar.nbytes
            self._found[at] = merged._replace(end_s=end_s, nbytes=nbytes, pass_index=-1)
            self._counts[at] += 1
            return
        if not alone:
            self._last[key] = len(self._found)
        self._found.append(bar)
        self._counts.append(1)

    def _is_near(self, bar: Bar, last: Bar) -> bool:
        near = bar.start_s - last.end_s <= self._gap_s
        return near and bar.end_s - last.start_s <= 8 * self._gap_s

    def bars(self) -> list[Bar]:
        """Return what has become of them."""
        return [
            b if n == 1 else b._replace(label=f"{n} of {b.stage or b.kind}")
            for b, n in zip(self._found, self._counts, strict=True)
        ]
