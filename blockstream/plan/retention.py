"""Retention policies: which segments of a stage stay across passes.

A denoising loop scans its segments cyclically, so a cache that evicts the least recently used never
hits; retention is a plan. A policy is a pure function `retain(stage, room) -> indices` that returns
segments whose `nbytes` sum to at most `room`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .segments import Stage


@dataclass(frozen=True)
class RetentionPolicy:
    """A named policy. `retains` is False for one that never keeps anything, whatever the room.

    `adjust(stage, room, there)` chooses again with `there` in memory, so that little is read anew.
    """

    name: str
    retain: Callable[[Stage, int], Sequence[int]]
    retains: bool = True
    adjust: Callable[[Stage, int, Collection[int]], Sequence[int]] | None = None


def retain_none(stage: Stage, room: int) -> Sequence[int]:
    """Retain nothing: every segment is loaded for every visit (the regime of Eq. 8)."""
    return ()


def retain_prefix(stage: Stage, room: int) -> Sequence[int]:
    """Retain the first segments that fit: the paper's Dynamic Loading (Eq. 9)."""
    chosen = []
    for i in _choices(stage):
        room -= stage.segments[i].nbytes
        if room < 0:
            break
        chosen.append(i)
    return chosen


def retain_spread(stage: Stage, room: int) -> Sequence[int]:
    """Retain as many segments as fit, evenly spaced in compute time, so that the loader idles least.

    The period of a pass approaches max(b e, (b - d) l), where `retain_prefix` needs d e + (b - d) l.
    """
    choices = _choices(stage)
    chosen = _evenly(stage, choices, room)
    # Unequal segments leave room: give it to the largest loads that still fit.
    left = room - _nbytes(stage, chosen)
    taken = set(chosen)
    for i in sorted(choices, key=lambda i: -stage.segments[i].load_s):
        if i not in taken and stage.segments[i].nbytes <= left:
            chosen.append(i)
            left -= stage.segments[i].nbytes
    return chosen


def adjust_spread(stage: Stage, room: int, there: Collection[int]) -> Sequence[int]:
    """Thin out or fill up what is there: drop evenly, add where the next one retained is farthest."""
    choices = _choices(stage)
    chosen = _evenly(stage, [i for i in choices if i in there], room)
    at = dict(zip(choices, _begins(stage, choices), strict=False))
    period = _begins(stage, choices)[-1]

    def apart(i: int, j: int) -> float:
        d = abs(at[i] - at[j])
        return min(d, period - d)

    # Of those equally far from what is retained, the one farthest from what was added.
    far = {
        i: (min((apart(i, j) for j in chosen), default=period), period) for i in choices if i not in chosen
    }
    left = room - _nbytes(stage, chosen)
    while fitting := [i for i in far if stage.segments[i].nbytes <= left]:
        best = max(fitting, key=lambda i: far[i])
        chosen.append(best)
        left -= stage.segments[best].nbytes
        del far[best]
        far = {i: (min(d, apart(i, best)), min(a, apart(i, best))) for i, (d, a) in far.items()}
    return chosen


def _evenly(stage: Stage, choices: Sequence[int], room: int) -> list[int]:
    """Return as many of the choices as fit, evenly spaced in compute time."""
    if _nbytes(stage, choices) <= room:
        return list(choices)
    spent = _begins(stage, choices)

    def evenly(d: int) -> list[int]:
        picked = []
        for k in range(d):
            at = bisect_right(spent, (k + 0.5) * spent[-1] / d) - 1
            picked.append(choices[min(at, len(choices) - 1)])
        return list(dict.fromkeys(picked))

    low, high = 0, len(choices)
    while low < high:
        middle = (low + high + 1) // 2
        if _nbytes(stage, evenly(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return evenly(low)


def _begins(stage: Stage, choices: Sequence[int]) -> list[float]:
    """Return when each choice begins in compute time, and the end; even steps where nothing takes time."""
    begins = list(accumulate((stage.segments[i].execute_s for i in choices), initial=0.0))
    return begins if begins[-1] > 0 else [float(k) for k in range(len(choices) + 1)]


def _nbytes(stage: Stage, chosen: Sequence[int]) -> int:
    return sum(stage.segments[i].nbytes for i in chosen)


def _choices(stage: Stage) -> list[int]:
    return [i for i in stage.visited if not stage.segments[i].resident and i not in stage.once]


NONE = RetentionPolicy("none", retain_none, retains=False)
PREFIX = RetentionPolicy("prefix", retain_prefix)
SPREAD = RetentionPolicy("spread", retain_spread, adjust=adjust_spread)

#: What `auto` compares.
POLICIES = (NONE, PREFIX, SPREAD)
