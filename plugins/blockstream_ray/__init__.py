"""Sweeps on a Ray cluster: `blockstream sweep CONFIG --prompts FILE --out WHERE --on ray`.

Ray places each run where its processors and its budget have room, and gives it out again when its node dies.
Ray itself is imported when a sweep begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockstream.plugins import Choice, hookimpl

from .options import RayOptions

__all__ = ["RayOptions"]


def _build(options: RayOptions) -> object:
    from .cluster import RayScheduler

    return RayScheduler(options)


@hookimpl
def schedulers() -> Sequence[Choice]:
    """List Ray."""
    return [Choice("ray", _build, RayOptions, "a Ray cluster: budgets and threads are its resources")]
