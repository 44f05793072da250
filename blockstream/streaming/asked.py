"""What a session was asked for: policies, a limit on weights, slots, lookahead, what may be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from blockstream.plan.planner import Observed, Plan, make_plan
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Schedule

from .op_costs import Measuring


@dataclass(frozen=True)
class Asked:
    """The choices that every plan of a session is made with; None leaves one to the planner."""

    policies: Sequence[RetentionPolicy]
    arena_nbytes: int | None = None
    slots: int | None = None
    lookahead: int | None = None
    device_arena_nbytes: int | None = None
    measuring: Measuring = field(default_factory=Measuring)

    def room(self, nbytes: int) -> int:
        """Return so many bytes for weights, or as many as were asked for."""
        return nbytes if self.arena_nbytes is None else min(nbytes, self.arena_nbytes)

    def plan(self, schedule: Schedule, nbytes: int, explicit: bool, observed: Observed | None = None) -> Plan:
        """Return a plan within so many bytes; what is not asked for as an amount is used only where it pays.

        A plan made anew, from what was `observed`, stays within the arena that there is.
        """
        make = partial(
            make_plan,
            schedule,
            nbytes if observed is None else min(nbytes, observed.end_nbytes),
            self.policies,
            slots=self.slots,
            lookahead=self.lookahead,
            observed=observed,
        )
        plan = make()
        if explicit or self.arena_nbytes is not None or plan.retains_all:
            return plan
        return make(thrifty=True)
