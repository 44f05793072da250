"""What every flow of a text-to-video model does beside its arithmetic: it tells where it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from blockstream.plugins import current_run

OnStep = Callable[[int, Tensor, Mapping[str, Any] | None], None]


class FlowBase(ABC):
    """What the flows of `blockstream.plugins.Flow` share: the times between their own, and their reports.

    `on_step(i, z, memory)` is called after each step; what it raises ends the run. `on_remaining(n)` is
    told how many velocities follow.
    """

    times: Sequence[float]

    def __init__(
        self, *, on_step: OnStep | None = None, on_remaining: Callable[[int], None] | None = None
    ) -> None:
        self.on_step = on_step
        self.on_remaining = on_remaining

    def velocity(self, z: Tensor, i: int) -> Tensor:
        """Return v(z, times[i]) in the shape of z. One pass of the model, or two with true guidance."""
        self._tell(i)
        return self.velocity_of(z, self.times[i], i)

    def velocity_at(self, z: Tensor, t: float) -> Tensor:
        """Return v(z, t) at any time from times[0] to 0, as `velocity` does at its own.

        For attention transforms it belongs to the step that begins at t or before it.
        """
        i = max(0, sum(time >= t for time in self.times) - 1)
        self._tell(i)
        return self.velocity_of(z, t, i)

    @abstractmethod
    def velocity_of(self, z: Tensor, t: float, i: int) -> Tensor:
        """Return v(z, t), t within the step from times[i]; where it is times[i], exactly as at index i."""

    def _tell(self, i: int) -> None:
        run = current_run()
        run.step, run.steps = i, len(self.times)

    def remaining(self, n: int) -> None:
        """Take note that at most `n` more velocities are asked for, from now on."""
        if self.on_remaining is not None:
            self.on_remaining(n)

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        """Mark the step up to index `i` as taken."""
        if self.on_step is not None:
            self.on_step(i, z, memory)
