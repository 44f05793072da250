"""How many bytes of weights a process may hold, now: its budget less all else it holds, as both move.

The ceiling is what the process may hold in all. An amount is never exceeded, and less where the system
has less to give; a part of the headroom ("auto") follows the headroom. Weights get the ceiling less the
most that was held outside the arena in this stage, less a margin for what samples miss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from blockstream.errors import BudgetError
from blockstream.system.limits import AVAILABLE, Headroom, HeadroomReader
from blockstream.system.memory import Held, MemoryWatch, held, trim_heap

from .amounts import format_nbytes, headroom_part, resolve_budget

log = logging.getLogger(__name__)

#: What 10 ms between samples may miss: at least so much, and this part of the ceiling.
MARGIN_NBYTES = 16 << 20
MARGIN_PART = 0.01
#: Left to the kernel (page tables, buffers) under a limit that it enforces.
GUARD_NBYTES = 16 << 20
#: What kernels take beside results.
WORKSPACE_NBYTES = 8 << 20
#: The headroom is read at most this often, but for one look before more is taken.
LOOK_S = 0.1
#: And where a stage has everything in memory: each look takes time from compute.
SETTLED_LOOK_S = 0.25
#: Limits on address space and data count what is mapped, touched or not.
_COUNT_MAPPED = ("RLIMIT_AS", "RLIMIT_DATA")


class Governor:
    """Follows one session's budget on the host. A `Ceiling`. `looks` and `read` replace the machine in tests.

    `touched_nbytes` and `mapped_nbytes` say how much of the session's arena is touched and mapped,
    `others_nbytes` what other sessions of the process will still touch.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        touched_nbytes: Callable[[], int] = lambda: 0,
        mapped_nbytes: Callable[[], int] = lambda: 0,
        others_nbytes: Callable[[], int] = lambda: 0,
        look: Callable[[], Headroom] | None = None,
        read: Callable[[], Held] = held,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._touched, self._mapped, self._others = touched_nbytes, mapped_nbytes, others_nbytes
        self._look = look
        self._read = read
        self._clock = clock
        self._headroom: Headroom | None = None
        self._looked_s = float("-inf")
        self._held_then = 0
        self._closed = False
        #: Whether what the heap keeps of freed memory is given back after every visit.
        self.frugal = False
        self.watch: MemoryWatch | None = None
        #: What the process held before the session, weights of others included.
        self.base_nbytes = 0
        #: The largest growth within one pass outside the arena: what compute needs.
        self.activations_nbytes = 0
        #: What was held outside the arena when the pass began.
        self.pass_base_nbytes = 0
        self._expected = self._outside_then = 0
        #: The largest growth outside the arena within one visit of this stage, and what it is counted from.
        self._need = self._visit_base = 0
        self.set(budget)

    def set(self, budget: int | str | None) -> None:
        """Follow another budget from now on; a warning says when there is not so much to have."""
        resolved = resolve_budget(budget, self._look() if self._look is not None else None)
        if resolved.warning:
            log.warning("%s", resolved.warning)
        self.explicit = resolved.explicit
        self.budget = budget
        self._amount = resolved.nbytes
        self._part = headroom_part(budget)
        self._looked_s = float("-inf")

    # -- the run -----------------------------------------------------------------------------

    def begin(self, **watch: Any) -> None:
        """Take what is held now as the process's own, and begin to watch; `watch` as for MemoryWatch."""
        trim_heap()
        self.base_nbytes = self._held_nbytes()
        self.watch = MemoryWatch(self._amount, arena_nbytes=self._touched, judge=self._judge_again, **watch)

    def begin_stage(self) -> None:
        """Forget what earlier stages held outside the arena; what they left in the heap goes back."""
        self._expected = self._outside_then = self._need = 0
        trim_heap()
        if self.watch is not None:
            self._visit_base = self.watch.forget_outside()

    def begin_pass(self) -> None:
        """Take note of what is held outside the arena before a pass computes."""
        if self.watch is not None:
            self.pass_base_nbytes = max(0, self.watch.sample().nbytes - self._touched())
            self._expected = 0

    def sample(self, label: str | None = None, known: bool = True) -> None:
        """Account for what is held now, after a visit.

        Until a block of each kind is `known` the growth of all visits counts as that of one.
        """
        if self.watch is not None:
            self.watch.sample(label)
            most, last = self.watch.lap()
            self._need = max(self._need, most - self._visit_base)
            self._visit_base = last if known else self._visit_base
            self._account()
            if self.frugal:
                trim_heap()

    def expect(self, activations_nbytes: int) -> None:
        """Expect a pass to take so much beside what is held now, though nothing has been seen of it."""
        self._expected = self.pass_base_nbytes + activations_nbytes

    def relieve(self) -> None:
        """Give back what the C library's heap keeps of what was freed.

        Compute will take some of it again: what a visit was seen to need stays reserved.
        """
        if self.watch is not None and not self.frugal:
            trim_heap()
            self._visit_base = self.watch.forget_outside(self._need)

    def has_grown(self) -> bool:
        """Return whether more was held outside the arena since the last call."""
        now, before = self.outside_nbytes, self._outside_then
        self._outside_then = now
        return now > before

    def close(self) -> None:
        """End the watch; its figures stay."""
        self._closed = True
        if self.watch is not None:
            self.watch.close()

    # -- limits ------------------------------------------------------------------------------

    def ceiling_nbytes(self, slack: bool = False) -> int:
        """Return the most the process may hold now.

        With `slack` half of what "auto" leaves to others counts as well: what is planned within the
        ceiling is given up only below that, so that the planner does not chase every movement.
        """
        now, free = self._held_nbytes(), self._free_nbytes()
        if self._part is None:
            return min(self._amount, now + free - (GUARD_NBYTES // 2 if slack else GUARD_NBYTES))
        return self._with_part(self._part, now, free, slack)

    def weights_nbytes(self, outside_nbytes: int | None = None, slack: bool = False) -> int:
        """Return the bytes weights may take now; below zero when there is no room for any.

        `outside_nbytes`: what is held beside the arena at most; what was seen in this stage if None.
        """
        if outside_nbytes is None:
            outside_nbytes = self.outside_nbytes
        ceiling = self.ceiling_nbytes(slack)
        margin = margin_nbytes(ceiling)
        return ceiling - outside_nbytes - self._others() - (margin // 2 if slack else margin)

    @property
    def outside_nbytes(self) -> int:
        """Return the most that was held outside the arena in this stage."""
        if self.watch is None:
            return max(0, self._held_nbytes() - self._touched())
        return max(self._expected, self.watch.outside_nbytes)

    def look_again(self) -> None:
        """Have the next figure come from a new look: what was free a moment ago may be gone."""
        self._looked_s = float("-inf")

    def is_due(self, settled: bool = False) -> bool:
        """Return whether the headroom may be looked at again; more rarely for a stage that has `settled`."""
        return self._clock() - self._looked_s >= (SETTLED_LOOK_S if settled else LOOK_S)

    def follow(self, at_once: bool = False) -> None:
        """Let the watch judge by the ceiling as it is now: call it when what is planned keeps to it.

        A ceiling that falls below what is held counts once that has been given back, or `at_once` when
        nothing more can be.
        """
        if self.watch is not None:
            judged = self._judged_by()
            if self.explicit or at_once or self._held_nbytes() <= judged:
                self.watch.budget_nbytes = judged

    def refuse(self, least_nbytes: int, outside_nbytes: int, largest: tuple[str, int], slots: int) -> None:
        """Raise BudgetError, naming the least that would do, when weights of `least_nbytes` do not fit.

        `least_nbytes` are the slots and what is resident, `largest` the largest segment's name and bytes.
        """
        ceiling = self.ceiling_nbytes()
        beside = outside_nbytes + self._others()
        # Two starts of one program differ by some pages: what was named as the least has to work.
        if least_nbytes <= self.weights_nbytes(outside_nbytes) + min(MARGIN_NBYTES // 4, ceiling // 250):
            return
        least = _with_margin(least_nbytes + beside)
        limit, raised = f"budget {_told_from(self._amount, least)}", ""
        if ceiling < self._amount:
            source = self._headroom.source if self._headroom is not None else "the system"
            limit = f"{limit}, of which {format_nbytes(max(0, ceiling))} are to be had under {source},"
            if self._headroom is not None and source != AVAILABLE:
                # What others hold under the limit, and what is left to the kernel, comes on top.
                beyond = self._headroom.limits[0].limit_nbytes - ceiling
                raised = f"that limit has to be {-(-(least + beyond) // 2**20)} MiB, "
        raise BudgetError(
            f"{limit} cannot hold {slots} slots of the largest segment ({largest[0]}, "
            f"{format_nbytes(largest[1])}) beside {format_nbytes(beside)} of runtime and activations; "
            f"{raised}the least is {-(-least // 2**20)} MiB"
        )

    def require(self, stage: str, least_nbytes: int, activations_nbytes: int) -> None:
        """Raise BudgetError when a pass that takes so much for certain would exceed an amount.

        `least_nbytes` are the weights that it cannot do without.
        """
        needed = least_nbytes + activations_nbytes + WORKSPACE_NBYTES
        if not self.explicit or needed + self.pass_base_nbytes <= self._amount:
            return
        self.relieve()
        self.begin_pass()
        if needed + self.pass_base_nbytes <= self._amount:
            return
        least = _with_margin(needed + self.pass_base_nbytes)
        raise BudgetError(
            f"budget {_told_from(self._amount, least)} cannot hold this pass of stage {stage!r}: "
            f"{format_nbytes(activations_nbytes)} of activations beside "
            f"{format_nbytes(self.pass_base_nbytes)} held before it (caches included) and "
            f"{format_nbytes(least_nbytes)} of weights; the least is {-(-least // 2**20)} MiB"
        )

    # -- report ------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return what report.json says of the budget."""
        watch = self.watch
        self._account()
        if watch is None:
            return {"nbytes": self._amount, "peak_nbytes": 0, "held": True, "by_cause": {}}
        causes = watch.by_cause(runtime=self.base_nbytes, activations=self.activations_nbytes)
        return {
            "nbytes": watch.budget_nbytes,
            "peak_nbytes": watch.peak_nbytes,
            "held": not watch.broken and watch.failure is None,
            "by_cause": causes,
            **({} if watch.failure is None else {"unwatched": str(watch.failure)}),
        }

    # -- inside ------------------------------------------------------------------------------

    def _account(self) -> None:
        """Take the most held outside the arena beyond what was held before the pass as its activations."""
        if self.watch is not None:
            most = self.watch.outside_nbytes - self.pass_base_nbytes
            self.activations_nbytes = max(self.activations_nbytes, most)

    def _with_part(self, part: float, now: int, free: int, slack: bool) -> int:
        """Return a ceiling that is a part of the headroom, or with `slack` midway to all of it."""
        base = min(self.base_nbytes or now, now + free)
        return base + int(((1 + part) / 2 if slack else part) * (now + free - base))

    def _judged_by(self) -> int:
        """Return what is too much: the amount, or the ceiling with its slack where the headroom has moved."""
        if self.explicit or self.ceiling_nbytes() <= self._amount <= self.ceiling_nbytes(slack=True):
            return self._amount
        return self.ceiling_nbytes(slack=True)

    def _judge_again(self, now: Held, judged: int) -> int:
        """Return what is too much at the very moment that more is held. Any thread; nothing is changed."""
        part, look = self._part, self._look
        if part is None or look is None:
            return judged
        return max(judged, self._with_part(part, now.nbytes, self._free_under(look()), slack=True))

    def _free_nbytes(self) -> int:
        """Return what the system would still give, from the last look unless a new one is due."""
        if self._headroom is None or self.is_due():
            if self._look is None:
                self._look = HeadroomReader().read
            self._headroom = self._look()
            self._looked_s = self._clock()
            self._held_then = self._held_nbytes()
        # What was taken since is no longer free.
        return max(0, self._free_under(self._headroom) - (self._held_nbytes() - self._held_then))

    def _free_under(self, headroom: Headroom) -> int:
        untouched = self._mapped() - self._touched()
        return min(
            limit.free_nbytes + (untouched if limit.source in _COUNT_MAPPED else 0)
            for limit in headroom.limits
        )

    def _held_nbytes(self) -> int:
        if self.watch is None or self._closed:
            return self._read().nbytes
        return self.watch.sample().nbytes


def margin_nbytes(ceiling: int) -> int:
    """Return what is left free under a ceiling for what samples miss."""
    return max(MARGIN_NBYTES, int(MARGIN_PART * ceiling))


def _with_margin(nbytes: int) -> int:
    """Return the least ceiling that leaves `nbytes` beside its margin."""
    return max(nbytes + MARGIN_NBYTES, -int(-nbytes // (1 - MARGIN_PART)))


def _told_from(nbytes: int, least: int) -> str:
    """Return an amount, in bytes where it would read like the least."""
    text = format_nbytes(nbytes)
    return f"{nbytes} bytes" if text == format_nbytes(least) else text
