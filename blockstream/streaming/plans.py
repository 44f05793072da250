"""What a session's stages lead to while they run: whoever holds its tier and plans for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from blockstream.module.faking import Call

from .stage_facts import Facts
from .top_tier import TopTier


class Plans(Protocol):
    """Holds the tier and makes the plans: `Replanner` on the processor, `DevicePlans` on a device."""

    @property
    def tier(self) -> TopTier:
        """Return the tier that modules compute from."""

    @property
    def facts(self) -> dict[str, Facts]:
        """Return what is known of each stage now, by name."""

    def start(self, stage: str) -> None:
        """Begin to read, for stage `stage` first."""

    def before_pass(self, stage: str, call: Call, path: str, first: bool) -> None:
        """Make room for what the inputs of a pass will need, before it computes."""

    def after_visit(self, stage: str, part: int) -> None:
        """Account for a visit."""

    def after_pass(self, stage: str, ran: Sequence[int], pass_index: int) -> None:
        """Account for a pass that ran in an order, and plan anew where that pays."""

    def resize(self, idle: str | None) -> None:
        """Go on under a new budget; stage `idle` is between visits."""

    @property
    def foresees(self) -> bool:
        """Return whether what a pass needs has to be known before it computes."""

    def needs_more(self) -> bool:
        """Return whether a stage whose calls are not followed has to give memory back. Any thread."""
