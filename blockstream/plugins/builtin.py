"""The built-in plugin: the Euler sampler, the retention policies, processes of this machine for sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .choices import Choice
from .hookspecs import hookimpl


def _euler(options: None) -> Any:
    from . import euler

    return euler.sample


@hookimpl
def samplers() -> Sequence[Choice]:
    """List the Euler sampler."""
    return [Choice("euler", _euler, summary="one step for each of the flow's times")]


@hookimpl
def retention_policies() -> Sequence[Choice]:
    """List `auto` and the policies it compares."""
    from blockstream.plan import retention

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


@hookimpl
def schedulers() -> Sequence[Choice]:
    """List the processes of this machine."""
    from blockstream.sweep.processes import Processes, ProcessOptions

    return [
        Choice("local", Processes, ProcessOptions, "processes of this machine, as many as it has room for")
    ]
