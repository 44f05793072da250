"""The two-step Adams-Bashforth method with variable steps, on a flow's own times."""

from __future__ import annotations


def sample(flow, z, i=0, memory=None):
    """Return the sample reached from `z` at index `i`: z += h (v + h / (2 h') (v - v')).

    v' and h' are those of the step before, which `memory` keeps, so that a run resumes after any step; the
    first step is Euler's. One pass a step.
    """
    n = len(flow.times)
    ends = [*flow.times[1:], 0.0]
    for step in range(i, n):
        v = flow.velocity(z, step)
        flow.remaining(n - step - 1)
        h, mean = flow.times[step] - ends[step], v
        if memory is not None:
            mean = v + (v - memory["velocity"]) * (h / (2 * memory["h"]))
        z = flow.advance(z, mean, step, step + 1)
        memory = {"velocity": v, "h": h}
        flow.step_done(step, z, memory)
    return z
