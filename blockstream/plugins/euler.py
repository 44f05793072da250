"""The built-in sampler: explicit Euler steps along the flow's own times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from blockstream.plugins.protocols import Flow


def sample(flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
    """Return the sample that Euler steps from `times[i]` to t = 0 reach: z += v dt, once a time.

    The velocity is evaluated once a step and the number of steps is exact, so that the flow knows
    after each of them how many are left. Nothing is remembered between steps.
    """
    n = len(flow.times)
    for step in range(i, n):
        v = flow.velocity(z, step)
        flow.remaining(n - step - 1)
        z = flow.advance(z, v, step, step + 1)
        flow.step_done(step, z, None)
    return z
