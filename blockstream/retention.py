"""Retention policies: which segments of a stage stay across passes.

A denoising loop scans its segments cyclically, so a cache that evicts the least recently used never
hits; retention is a plan. A policy is a pure function `retain(stage, room) -> indices` that returns
segments whose `nbytes` sum to at most `room`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .segments import Stage


@dataclass(frozen=True)
class RetentionPolicy:
    """A named policy. `retains` is False for one that never keeps anything, whatever the room."""

    name: str
    retain: Callable[[Stage, int], Sequence[int]]
    retains: bool = True


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
    spent = list(accumulate((stage.segments[i].execute_s for i in choices), initial=0.0))
    if spent[-1] <= 0:
        spent = [float(k) for k in range(len(choices) + 1)]

    def evenly(d: int) -> list[int]:
        picked = []
        for k in range(d):
            at = bisect_right(spent, (k + 0.5) * spent[-1] / d) - 1
            picked.append(choices[min(at, len(choices) - 1)])
        return list(dict.fromkeys(picked))

    def cost(chosen: Sequence[int]) -> int:
        return sum(stage.segments[i].nbytes for i in chosen)

    low, high = 0, len(choices)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(evenly(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    chosen = evenly(low)
    # Unequal segments leave room: give it to the largest loads that still fit.
    left = room - cost(chosen)
    taken = set(chosen)
    for i in sorted(choices, key=lambda i: -stage.segments[i].load_s):
        if i not in taken and stage.segments[i].nbytes <= left:
            chosen.append(i)
            left -= stage.segments[i].nbytes
    return chosen


def _choices(stage: Stage) -> list[int]:
    return [i for i in stage.visited if not stage.segments[i].resident]


NONE = RetentionPolicy("none", retain_none, retains=False)
PREFIX = RetentionPolicy("prefix", retain_prefix)
SPREAD = RetentionPolicy("spread", retain_spread)

#: What `auto` compares.
POLICIES = (NONE, PREFIX, SPREAD)
