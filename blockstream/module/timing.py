"""How long something takes here: without whatever else runs, and how much longer beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: The least and the most runs that are timed.
LEAST_RUNS, MOST_RUNS = 3, 40


class Timed(NamedTuple):
    """Seconds of one run: the shortest of them, which other work did not interrupt, and the mean."""

    quiet_s: float
    mean_s: float


def timed(run: Callable[[], Any], most_s: float, clock: Callable[[], float] = time.perf_counter) -> Timed:
    """Time something for about `most_s` seconds, after a run that sets up what it needs."""
    with torch.inference_mode():
        run()
        spent: list[float] = []
        begin = last = clock()
        while len(spent) < LEAST_RUNS or (last - begin < most_s and len(spent) < MOST_RUNS):
            run()
            now = clock()
            spent.append(now - last)
            last = now
            if last - begin > 4 * most_s:
                break
    return Timed(max(min(spent), 1e-9), sum(spent) / len(spent))


#: How long it is looked for other work.
PROBE_S = 0.08
_SIDE = 192


def slowdown(most_s: float = PROBE_S) -> float:
    """Return how many times as long computing takes now as it would alone: 1 on a quiet machine."""
    a = torch.full((_SIDE, _SIDE), 0.5)
    found = timed(lambda: a @ a, most_s / 10)
    spent, until = [found.mean_s], time.perf_counter() + most_s
    quiet = found.quiet_s
    while time.perf_counter() < until:
        one = timed(lambda: a @ a, most_s / 10)
        quiet = min(quiet, one.quiet_s)
        spent.append(one.mean_s)
    return max(1.0, sum(spent) / len(spent) / quiet)
