"""How a session starts: its first plan, then the tier and the plans that go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockstream.budget.governor import Governor
from blockstream.device.budget import DeviceBudget
from blockstream.engine.ledger import Ledger
from blockstream.errors import EngineError
from blockstream.module.faking import Call
from blockstream.plan.plain import plan_record

from .asked import Asked
from .declared import Declared
from .device_plans import DevicePlans, FirstOnDevice, first_on_device
from .first import First, first_plan
from .host_tier import HostTier
from .observing import Observing
from .plans import Plans
from .replanner import Replanner
from .tower import TowerTier


class Starter:
    """Plans before anything runs, then opens a tier, `on` a device where one is named."""

    def __init__(
        self,
        governor: Governor,
        on: DeviceBudget | None,
        asked: Asked,
        variant: str,
        ledger: Ledger,
        observing: Observing,
    ) -> None:
        self._governor, self._on, self._asked, self._variant = governor, on, asked, variant
        self._ledger, self._observing = ledger, observing

    def first(self, stages: Sequence[Declared], called: tuple[str, Call] | None) -> First:
        """Return the first plan, from headers alone; `called` as for `first_plan`."""
        if not stages:
            raise EngineError("the session has no stages; add one with stage()")
        if self._on is not None:
            return first_on_device(stages, self._governor, self._on, self._asked, self._variant)
        return first_plan(stages, self._governor, self._asked, self._variant, called)

    def forecast(self, first: First) -> dict[str, Any] | None:
        """Return what a first plan expects to be held on a device, and of its link; None without one."""
        if self._on is None or not isinstance(first, FirstOnDevice):
            return None
        return {
            **self._on.forecast(first.plan.arena_nbytes, first.device_activations_nbytes),
            "link": {"bytes_per_s": self._on.device.speeds.link, "measured": False},
            "flops": self._on.device.speeds.flops,
        }

    def open(self, first: First, stages: Sequence[Declared]) -> Plans:
        """Return what holds a tier made for the first plan; nothing is read until it is started."""
        self._ledger.note("plan", plan_record(first.plan))
        self._governor.frugal = first.frugal
        self._governor.follow()
        told = self._observing.on_loaded, self._observing.on_executed
        if isinstance(first, FirstOnDevice):
            assert self._on is not None
            tower = TowerTier(first.tiers, self._on, stages, self._ledger, *told)
            return DevicePlans(tower, self._governor, self._on, self._ledger, self._asked, first, stages)
        tier = HostTier(first.plan, stages, self._ledger, *told)
        return Replanner(tier, self._governor, self._ledger, self._asked, first, stages)
