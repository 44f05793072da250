"""The seam between plans and a budget: how much of one memory weights may take, now."""

from __future__ import annotations

from typing import Protocol


class Ceiling(Protocol):
    """What follows the budget of one memory: the host's (`Governor`), or a device's.

    Bytes `outside` are those held in that memory beside arenas. Compute thread only.
    """

    @property
    def explicit(self) -> bool:
        """Return whether the budget is an amount, not a part of what is free."""

    @property
    def outside_nbytes(self) -> int:
        """Return the most that was held outside in this stage, or is expected."""

    @property
    def activations_nbytes(self) -> int:
        """Return the largest growth outside within one pass."""

    @property
    def pass_base_nbytes(self) -> int:
        """Return what was held outside when the pass began."""

    def weights_nbytes(self, outside_nbytes: int | None = None, slack: bool = False) -> int:
        """Return the bytes weights may take beside so much; what was seen in this stage if None.

        With `slack` so much as is given up only when it is no longer there.
        """

    def refuse(self, least_nbytes: int, outside_nbytes: int, largest: tuple[str, int], slots: int) -> None:
        """Raise BudgetError, naming the least that would do, when weights of `least_nbytes` do not fit."""

    def require(self, stage: str, least_nbytes: int, activations_nbytes: int) -> None:
        """Raise BudgetError when a pass that takes so much for certain would exceed an explicit budget."""

    def begin_stage(self) -> None:
        """Forget what earlier stages held outside."""

    def begin_pass(self) -> None:
        """Take note of what is held outside before a pass computes."""

    def expect(self, activations_nbytes: int) -> None:
        """Expect the pass to take so much, though nothing has been seen of it."""

    def sample(self, label: str | None = None, known: bool = True) -> None:
        """Account for what is held now, after a visit."""

    def relieve(self) -> None:
        """Give back what an allocator keeps of what was freed."""

    def has_grown(self) -> bool:
        """Return whether more was held outside since the last call."""

    def is_due(self, settled: bool = False) -> bool:
        """Return whether what is free may be looked at again."""

    def look_again(self) -> None:
        """Have the next figure come from a new look."""

    def follow(self, at_once: bool = False) -> None:
        """Judge by the ceiling as it is now."""
