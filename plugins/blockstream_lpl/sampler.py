"""The sampler: one loop over a flow, and what can be said of a run before and after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from blockstream.errors import ConfigError
from blockstream.plugins.straight import straight

from .past import Past
from .rules import Fixed, Measured, Published, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from blockstream.plugins import Flow

log = logging.getLogger(__name__)

Statistic = Literal["error", "reference"]
TOLERANCE = 0.03


class Options(BaseModel):
    """What a config may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistic: Statistic = Field(
        default="error",
        description="what decides a leap: error, measured on the way, or reference, the published rule's",
    )
    tolerance: float = Field(
        default=TOLERANCE,
        gt=0,
        description="error that leaps may add to the sample, relative to its way from noise; more is faster",
    )
    leap: int | None = Field(
        default=None,
        ge=2,
        description="the fixed form instead: take (leap - 1) / leap of the steps, then one pass goes to the "
        "end; with statistic: reference the last step's velocity does, as in the authors' code",
    )


def sample(
    flow: Flow,
    z: Tensor,
    i: int = 0,
    memory: Mapping[str, Any] | None = None,
    *,
    statistic: Statistic = "error",
    tolerance: float = TOLERANCE,
    leap: int | None = None,
) -> Tensor:
    """Return the sample reached from z [B, ...] at index `i`, leaping where the flow is straight.

    One pass a step; all samples of a batch step together. `flow.remaining` is told before each pass how
    many may come, and again after it, so that what was prefetched for steps leapt over can be dropped.
    `memory` is what `flow.step_done` was last given. Raises ConfigError for a flow that is not straight.
    """
    _refuse_bent(flow)
    rule = rule_of(statistic, tolerance, leap)
    past, times = Past.of(memory), flow.times
    n = len(times)
    # A flow that changes between two indices (a frame joins, the resolution grows) breaks off there.
    breaks = sorted({int(b) for b in getattr(flow, "breaks", ()) if 0 < b < n} | {n})
    while i < n:
        left = max(0, rule.passes(n)[1] - i - 1)
        flow.remaining(left + 1)
        v = flow.velocity(z, i)
        if i in breaks:
            past.forget()
        limit = next(b for b in breaks if b > i)
        move = rule.move(times, i, limit, v, past)
        past.add(i, v, move.error)
        flow.remaining(min(left, n - move.to))
        z = flow.advance(z, move.velocity, i, move.to)
        i = move.to
        flow.step_done(i - 1, z, past.memory())
    if past.steps == list(range(n)):
        few = rule.passes(n)[0] == n
        reason = (
            "there are too few to leap over any" if few else "the flow never became straight enough to leap"
        )
        log.warning("lpl: all %d steps were taken, %s", n, reason)
    return z


def _refuse_bent(flow: Flow) -> None:
    """Raise ConfigError for a flow that is not straight, by its scheduler's config where it has one."""
    scheduler = getattr(flow, "scheduler", None)
    why = ""
    if scheduler is not None:
        verdict = straight(scheduler)
        if verdict.straight and flow.straight:
            log.info("lpl: %s", verdict.why)
            return
        why = f" ({verdict.why})" if not verdict.straight else ""
    elif flow.straight:
        return
    raise ConfigError(
        f"lpl: this flow is not straight{why}. A leap goes on along the current velocity, as the "
        "trajectories of a rectified flow do; those of a diffusion solver (DPM-Solver, as in CogVideoX) bend "
        "all the way. Use sampler: euler, or the model's own"
    )


def passes(
    n: int, *, statistic: Statistic = "error", tolerance: float = TOLERANCE, leap: int | None = None
) -> tuple[int, int]:
    """Return the least and the most passes that `n` steps take: the earliest leap, and no leap."""
    return rule_of(statistic, tolerance, leap).passes(n)


def rule_of(statistic: Statistic, tolerance: float, leap: int | None) -> Rule:
    """Return the rule that some options stand for."""
    if leap is not None:
        return Fixed(leap, reuses=statistic == "reference")
    return Published() if statistic == "reference" else Measured(tolerance)


class LinearProportionalLeap:
    """The sampler of some options."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()

    def __call__(self, flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
        """Return the sample reached from `z` at index `i`: see `sample`."""
        return sample(flow, z, i, memory, **dict(self.options))

    def passes(self, n: int) -> tuple[int, int]:
        """Return the least and the most passes that `n` steps take."""
        return passes(n, **dict(self.options))

    def report(self, memory: Mapping[str, Any], n: int) -> dict[str, Any]:
        """Return what a run of `n` steps did, from its last memory, for report.json.

        `steps` are the indices computed, `leaps` pairs of indices, `cosine` between each velocity and
        the one before and `error` the relative second difference, one list a sample.
        """
        past = Past.of(memory)
        ends = [*past.steps[1:], n]
        leaps = [[a, b] for a, b in zip(past.steps, ends, strict=True) if b > a + 1]
        return {
            "name": "lpl",
            "passes": len(past.steps),
            "of": n,
            "leaps": leaps,
            "straight": bool(leaps),
            "steps": past.steps,
            "cosine": _by_sample(past.cosine),
            "error": _by_sample(past.error),
        }


def _by_sample(rows: list[Tensor]) -> list[list[float | None]]:
    """Return [steps][B] numbers as one list a sample; what was not measured is None."""
    numbers = [[None if math.isnan(x) else x for x in row.tolist()] for row in rows]
    return [list(column) for column in zip(*numbers, strict=True)]
