"""What LPL is measured against at an equal number of passes: fewer steps, plain or to second order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockstream.nn import euler
from blockstream.pipeline import Flow

__all__ = ["ab2", "euler_steps"]

euler_steps = euler.sample


def ab2(flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
    """Return the sample that the two-step Adams-Bashforth method with variable steps reaches.

    z += h (v + h / (2 h') (v - v')), v' and h' those of the step before; the first step is Euler's.
    """
    n = len(flow.times)
    ends = [*flow.times[1:], 0.0]
    for step in range(i, n):
        flow.remaining(n - step - 1)
        v = flow.velocity(z, step)
        h, mean = flow.times[step] - ends[step], v
        if memory is not None:
            mean = v + (v - memory["velocity"]) * (h / (2 * memory["h"]))
        z = flow.advance(z, mean, step, step + 1)
        memory = {"velocity": v, "h": h}
        flow.step_done(step, z, memory)
    return z
