"""When to leap, how far, and with which velocity: the rules a sampler goes by.

A rule is asked once a pass: given the velocity at index i it returns the index to go to and the mean
velocity on the way there. It keeps nothing itself; what it remembers lies in `Past`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .past import Past, size

if TYPE_CHECKING:
    from torch import Tensor


class Move(NamedTuple):
    """Where to go and the mean velocity on the way; `error` [B] is what the decision rests on."""

    to: int
    velocity: Tensor
    error: Tensor | None = None


class Rule(Protocol):
    """What decides each step."""

    def passes(self, n: int) -> tuple[int, int]:
        """Return the least and the most passes that `n` steps can take."""

    def move(self, times: Sequence[float], i: int, limit: int, v: Tensor, past: Past) -> Move:
        """Return the step from index `i` < len(times), at most to `limit` unless it ends the run."""


@dataclass(frozen=True)
class Fixed:
    """LPL (n): take the first (n - 1) / n of the steps; the pass after them goes on to the end.

    So the published tables count: 26 of 50 passes. The authors' code spares that pass and goes on with the
    velocity of the last step (`reuses`): 25 of 50.
    """

    leap: int
    reuses: bool = False

    def passes(self, n: int) -> tuple[int, int]:
        """Return the exact number, twice."""
        steps = n * (self.leap - 1) // self.leap
        exact = max(1, steps) if self.reuses else min(n, steps + 1)
        return exact, exact

    def move(self, times: Sequence[float], i: int, limit: int, v: Tensor, past: Past) -> Move:
        """Step to the next index; from the last pass, to the end."""
        n = len(times)
        return Move(n if i + 1 >= self.passes(n)[0] else i + 1, v)


@dataclass(frozen=True)
class Published:
    """The published rule, as the authors' code has it: leap to the end when straightening has stalled.

    From index 14 on, whatever the number of steps, a mean cosine that does not beat the best by more than
    0.001 spends one of 3 tries; one that does restores them. Only sample 0, channel 0, frame 0 is looked
    at, row by row. Unlike theirs, nothing outlives the run and a batch may hold several samples.
    """

    minimum_steps: int = 14
    gain: float = 1e-3
    patience: int = 3

    def passes(self, n: int) -> tuple[int, int]:
        """Return the passes to the earliest leap, and `n`: the leap may never come."""
        return min(n, self.minimum_steps + self.patience), n

    def move(self, times: Sequence[float], i: int, limit: int, v: Tensor, past: Past) -> Move:
        """Step to the next index, or to the end."""
        if not past.velocities or i < self.minimum_steps:
            return Move(i + 1, v)
        best, tries = past.numbers.get("best", 0.0), past.numbers.get("tries", self.patience)
        found = rows_cosine(v, past.velocities[-1][1])
        if found > best + self.gain:
            best, tries = found, self.patience
        else:
            tries -= 1
        past.numbers.update(best=best, tries=tries)
        return Move(i + 1 if tries > 0 else len(times), v)


@dataclass(frozen=True)
class Measured:
    """Leap as far as the error of leaping, measured on the way, stays within a tolerance.

    A leap from i to j stands for the Euler steps between: their velocities are those of the line through the
    last two passes, so that a step to the next index is Euler's own. The next pass shows by how much the
    line missed; that gives the second difference of the velocity, and with it (1) what the steps leapt over
    should have been, put right in the following step without another pass, and (2) the error of the next
    leap, which may be `tolerance` for each unit of time, relative to the velocity, in every sample of the
    batch. This is a two-step Adams predictor and corrector with variable steps (Hairer, Norsett and Wanner,
    Solving Ordinary Differential Equations I, III.5), made to reproduce the sum of the fine steps, not the
    integral: what is aimed at is the sample that all the steps would have reached.

    No leap is more than three times as long as the one before, and none spans more than half of the steps
    left: a trajectory that bends again is met in time. The last step is always a single one, so that its
    pass is known to be the last before it begins.
    """

    tolerance: float

    def start(self, n: int) -> int:
        """Return the first index that may leap: two differences exist, and a 15th of the steps is taken."""
        return max(2, math.ceil(n / 15))

    def passes(self, n: int) -> tuple[int, int]:
        """Return the passes where every leap is as long as it may be, and `n`."""
        p, i, least = -1, 0, 0
        while i < n:
            p, i, least = i, self.farthest(n, p, i), least + 1
        return least, n

    def farthest(self, n: int, p: int, i: int) -> int:
        """Return the farthest index to go to from index `i`, reached from `p`."""
        return i + 1 if i < self.start(n) else i + max(1, min(3 * (i - p), (n - i) // 2))

    def move(self, times: Sequence[float], i: int, limit: int, v: Tensor, past: Past) -> Move:
        """Step to the farthest index within the tolerance, at most to `limit`."""
        if len(past.velocities) < 2:
            return Move(i + 1, v)
        (q, v_q), (p, v_p) = past.velocities
        t = Times(times)
        if min(t[q] - t[p], t[p] - t[i], t[i] - t[i + 1]) <= 0:
            return Move(i + 1, v)  # a step of no length, as where a flow's last time is 0 already
        slope = (v - v_p) / (t[p] - t[i])
        bend = (slope - (v_p - v_q) / (t[q] - t[p])) / (t[q] - t[i])
        relative = size(bend) / size(v).clamp_min(1e-20)
        to, farthest = i + 1, min(limit, self.farthest(len(times), p, i))
        while to < farthest:
            allowed = self.tolerance * (t[i] - t[to + 1])
            if not bool((relative * t.missed(p, i, to + 1) <= allowed).all()):
                break
            to += 1
        behind = slope * t.lag(i, to) + bend * t.missed(q, p, i)
        return Move(to, v + behind / (t[i] - t[to]), relative)


class Times:
    """Sums over the Euler steps of a leap; an index past the last is t = 0."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times = (*times, 0.0)

    def __getitem__(self, i: int) -> float:
        return self._times[i]

    def lag(self, i: int, to: int) -> float:
        """Return the sum of dt (t_i - t) over the steps from i to `to`: 0 for a single one."""
        return sum((self[k] - self[k + 1]) * (self[i] - self[k]) for k in range(i, to))

    def missed(self, p: int, i: int, to: int) -> float:
        """Return the sum of dt (t_i - t)(t_p - t) over the steps from i to `to`: 0 for a single one.

        Times the second difference of the velocity, it is what a line through p and i misses.
        """
        steps = range(i, to)
        return sum((self[k] - self[k + 1]) * (self[i] - self[k]) * (self[p] - self[k]) for k in steps)


def rows_cosine(v: Tensor, before: Tensor) -> float:
    """Return the mean cosine of two velocities' rows, in the first plane of [B, C, T, H, W]."""
    from torch.nn.functional import cosine_similarity

    while v.dim() > 2:
        v, before = v[0], before[0]
    return float(cosine_similarity(v, before, dim=-1).mean())
