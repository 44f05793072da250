"""The course a stage takes: which kinds of block have run, in which order, and what forwards need."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from .declared import Declared
from .needs import Needs
from .stage_facts import Facts

log = logging.getLogger(__name__)


class Course:
    """What was seen of one stage while it runs. Compute thread only."""

    def __init__(self, stage: Declared) -> None:
        self.needs = Needs(stage.prepared)
        #: The kinds of block that have run: what compute needs is known by kind.
        self._seen: set[tuple[type, int]] = set()
        self._ran: list[int] = []
        self._ran_before: tuple[int, ...] = ()
        self._strayed = 0

    def begin_pass(self) -> None:
        """Begin a pass."""
        self._ran.clear()

    def visited(self, facts: Facts, part: int) -> None:
        """Take note of a visit."""
        self._ran.append(part)
        self._seen.add(facts.cut.kinds[part])

    def is_known(self, facts: Facts) -> bool:
        """Return whether a block of each kind has run, and nothing but in the order that is planned."""
        astray = facts.guessed and tuple(self._ran) != facts.order[: len(self._ran)]
        return not astray and all(facts.cut.kinds[i] in self._seen for i in facts.order)

    def learn(self, facts: Facts, order: Sequence[int], pass_index: int) -> tuple[Facts, bool]:
        """Return the stage after a pass that ran in an `order`, and whether that is the one to plan with.

        An order other than the planned one is taken once it came twice, or where the planned one was a guess.
        """
        ran = tuple(order)
        astray = ran != facts.order
        settled = facts.guessed or ran == self._ran_before
        reordered = astray and settled
        self._strayed = self._strayed + 1 if astray and not settled else 0
        if self._strayed == 2:
            log.warning(
                "stage %r runs its segments in another order in every pass (pass %s ran %d, the plan has "
                "%d); what is not next is loaded on demand, which is correct but not overlapped",
                *(facts.name, pass_index, len(ran), len(facts.order)),
            )
        self._ran_before = ran
        return replace(facts, order=ran if reordered else facts.order, guessed=False), reordered
