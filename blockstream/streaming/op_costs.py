"""What operations take on this machine: measured at the shapes that will run, kept, never of another network.

A time is that of a quiet machine: the shortest of several runs. How much longer it takes beside the work that
runs here now is one factor, found where a plan is made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache, cached_property

import torch

from blockstream.module.recorded import BESIDE_FLOPS, MOST_FLOPS, MOST_NBYTES, product, runnable
from blockstream.module.timing import slowdown, timed
from blockstream.plan.operations import Op, Work, filled
from blockstream.system import calibration

#: What bounds an operation before any of its like has been measured: bytes a second, and a call.
MEMORY_SPEED, OP_S = 8e9, 4e-6
#: The part of a large product's speed that others reach before they have been measured.
EFFICIENCY = 0.6
#: How long that product, and other work beside it, may be looked at.
PRODUCT_S = 0.2
#: How long a plan, and a run before it begins, may run operations to predict by, on how many bytes.
MAY = {"plan": (2.5, MOST_NBYTES), "run": (0.3, 8 << 20), "": (0.0, 0)}
#: Operations are measured until so much of what a forward is expected to take has been.
ENOUGH = 0.98
#: How long one is measured.
AN_OPERATION_S = 0.012


class Measuring:
    """What may be measured for a plan: for `most_s` seconds in all, on operands of `most_nbytes`."""

    def __init__(self, most_s: float = 0.0, most_nbytes: int = MOST_NBYTES) -> None:
        self.most_s, self.most_nbytes = most_s, most_nbytes
        #: The seconds that measuring has taken, and rehearsing: another plan of the same spends none.
        self.spent_s = self.rehearsed_s = 0.0

    @cached_property
    def load(self) -> float:
        """Return the part of the processors that other work takes now; 0 where nothing may be measured."""
        if not self.most_s:
            return 0.0
        begin = time.perf_counter()
        found = 1 - 1 / min(slowdown(), most_slowdown())
        self.spent_s += time.perf_counter() - begin
        return found

    def seconds(self, op: Op) -> float | None:
        """Return what an operation takes alone; None where no time is left, or it does not run by itself."""
        if self.spent_s >= self.most_s:
            return None
        most_flops = BESIDE_FLOPS if self.load > BUSY else MOST_FLOPS
        begin = time.perf_counter()
        try:
            ready = runnable(op, self.most_nbytes, most_flops)
            return None if ready is None else timed(ready.call, AN_OPERATION_S).quiet_s * ready.times
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, MemoryError):
            return None  # not on zeros, or not by itself: its like say what it takes
        finally:
            self.spent_s += time.perf_counter() - begin


def most_slowdown() -> float:
    """Return how many times as long anything can take, by the tasks that waited for processors lately.

    Twice the fair share: threads that compute together wait for the last of them.
    """
    try:
        waiting = os.getloadavg()[0]
    except OSError:
        return 2.0
    return 1 + 2 * waiting / (os.cpu_count() or 1)


def op_seconds(work: Work, measuring: Measuring) -> tuple[list[float], float]:
    """Return what each operation of a forward takes alone here, and which part of the time was measured.

    What is not kept is measured while there is time, the dearest first.
    """
    threads, counts = torch.get_num_threads(), work.counts()
    guessed = [_guessed(op, threads) for op in work.ops]
    expected = [g * n for g, n in zip(guessed, counts, strict=True)]
    found: dict[int, float] = {}
    for i, op in enumerate(work.ops):
        if (kept := kept_seconds(op, threads, measuring)) is not None:
            found[i] = kept
    done, whole = sum(expected[i] for i in found), sum(expected) or 1.0
    dearest, fresh = sorted(range(len(work.ops)), key=lambda i: -expected[i]), list[int]()
    for i in dearest:
        if i in found or done >= ENOUGH * whole:
            continue
        if (took := _measure(work.ops[i], threads, measuring)) is not None:
            found[i] = took
            fresh.append(i)
            done += expected[i]
    if fresh and measuring.load > BUSY:  # other work may have interrupted every run of one
        for i in fresh:
            if (
                measuring.spent_s < measuring.most_s / 2
                and (took := measuring.seconds(work.ops[i])) is not None
            ):
                found[i] = min(found[i], took)
                _keep(work.ops[i], threads, measuring, found[i])
    return filled(work.ops, found, guessed), done / whole


def kept_seconds(op: Op, threads: int, measuring: Measuring) -> float | None:
    """Return what an operation took here before; None where that is not known, or can be known better now."""
    if not op.spec:
        return None
    kept = calibration.believed(calibration.operation_of(op.spec, threads), 0.0)
    if kept is None or "s" not in kept.numbers:
        return None
    if measuring.most_s and kept.load > measuring.load + calibration.ALIKE:
        return None  # it was measured beside more work than there is now
    return kept.numbers["s"]


def _measure(op: Op, threads: int, measuring: Measuring) -> float | None:
    found = measuring.seconds(op)
    if found is not None:
        _keep(op, threads, measuring, found)
    return found


def _keep(op: Op, threads: int, measuring: Measuring, seconds: float) -> None:
    calibration.write(calibration.operation_of(op.spec, threads), {"s": seconds}, load=measuring.load)


def _guessed(op: Op, threads: int) -> float:
    """Return what an operation takes by its arithmetic and bytes, before any of its like was measured."""
    arithmetic = op.flops / product_speed(op.dtype, threads) if op.flops else 0.0
    return max(arithmetic, op.nbytes / MEMORY_SPEED) + OP_S


@cache
def product_speed(dtype: str, threads: int) -> float:
    """Return the operations a second that a network is expected to reach, from a product of two matrices."""
    op = product(dtype)
    kept = kept_seconds(op, threads, Measuring())
    took = kept if kept is not None else _measure(op, threads, Measuring(PRODUCT_S))
    return EFFICIENCY * op.flops / took if took else 20e9


#: From this part of the processors on, other work is taken into account.
BUSY = 0.12


#: Other work is expected to go on for so long; what takes longer is predicted as if alone.
LASTS_S = 600.0


def stretched(seconds: Mapping[str, float], load: float, whole_s: float) -> tuple[dict[str, float], str]:
    """Return quiet seconds as they are beside other work that takes `load` of the processors, and why.

    `whole_s`: what all of it takes alone. No reason is given on a quiet machine.
    """
    if load <= BUSY:
        return dict(seconds), ""
    times = f"{1 / (1 - load):.1f} times as long beside the other work here"
    if whole_s > LASTS_S:
        return dict(seconds), f"; as if alone, now it would take {times}"
    return {name: s / (1 - load) for name, s in seconds.items()}, f", {times}"
