"""What every flow of a text-to-video model does beside its arithmetic: it tells where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

OnStep = Callable[[int, Tensor, Mapping[str, Any] | None], None]


class FlowBase:
    """The reports of a `blockstream.pipeline.Flow`.

    `on_step(i, z, memory)` is called after each step; what it raises ends the run. `on_remaining(n)` is
    told how many velocities follow. A flow sets `_computed` once it has made a velocity.
    """

    def __init__(
        self, *, on_step: OnStep | None = None, on_remaining: Callable[[int], None] | None = None
    ) -> None:
        self.on_step = on_step
        self.on_remaining = on_remaining
        self._computed = False

    def remaining(self, n: int) -> None:
        """Take note that at most `n` more calls of `velocity` follow this one.

        `on_remaining` is told once this one is made: until then its weights are needed.
        """
        if self._computed and self.on_remaining is not None:
            self.on_remaining(n)

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        """Mark the step from index `i` as taken."""
        self._computed = False
        if self.on_step is not None:
            self.on_step(i, z, memory)
