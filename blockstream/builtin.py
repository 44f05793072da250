"""The built-in plugin: the Euler sampler and the retention policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .choices import Choice
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from .pipeline import Flow


def euler(flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
    """Return the sample reached from `z` at index `i` by one explicit Euler step a time.

    Keeps no memory of its own, so a run resumes from z and i alone.
    """
    for k in range(i, len(flow.times)):
        flow.remaining(len(flow.times) - k - 1)
        z = flow.advance(z, flow.velocity(z, k), k, k + 1)
        flow.step_done(k, z, None)
    return z


@hookimpl
def samplers() -> Sequence[Choice]:
    """List the Euler sampler."""
    return [Choice("euler", lambda _: euler, summary="one step for each of the flow's times")]


@hookimpl
def retention_policies() -> Sequence[Choice]:
    """List `auto` and the policies it compares."""
    from . import retention

    return [
        Choice(
            "auto",
            lambda _: retention.POLICIES,
            summary="the least predicted time over none, prefix and spread",
        ),
        Choice("none", lambda _: (retention.NONE,), summary="retain nothing (Eq. 8)"),
        Choice("prefix", lambda _: (retention.PREFIX,), summary="the first segments (Eq. 9)"),
        Choice("spread", lambda _: (retention.SPREAD,), summary="evenly spaced in compute time"),
    ]
