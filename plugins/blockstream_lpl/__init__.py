"""Linear Proportional Leap: a sampler that leaps over the straight parts of a rectified flow.

    sampler: lpl                                  # leaps sized by their measured error
    sampler: {name: lpl, tolerance: 0.02}         # fewer passes, further from the full number of steps
    sampler: {name: lpl, statistic: reference}    # the published rule: one leap to the end
    sampler: {name: lpl, leap: 2}                 # the published fixed form: half, then to the end

A rectified flow's trajectories become straight, so many steps of the same velocity can be one. The
published rule (Mobile-Oriented Video Diffusion, section 4) watches the cosine between consecutive velocities
and leaps to the end once it no longer grows. The default leaps over the middle and lands before the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockstream.plugins import Choice, hookimpl

from .sampler import LinearProportionalLeap, Options, passes, sample

__all__ = ["LinearProportionalLeap", "Options", "passes", "sample"]


@hookimpl
def samplers() -> Sequence[Choice]:
    """List the sampler of this plugin."""
    return [
        Choice("lpl", LinearProportionalLeap, Options, "leap over the straight parts of a rectified flow")
    ]
