"""What forwards hold beside weights, foreseen from their inputs before anything computes.

A cache that a model is given back at each forward is told from its inputs proper: it grows by what a forward
adds, and what is computed hardly grows with it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockstream.module.binding import tensors_in
from blockstream.module.faking import Call
from blockstream.module.forked import in_fork
from blockstream.module.kept_rehearsals import Rehearsal
from blockstream.module.prepared import Prepared
from blockstream.module.rehearsal import WORKSPACE_NBYTES, needs_imports, rehearse

#: Inputs larger than any before by this factor need more room than was seen.
LARGER = 1.1
#: What has grown by this factor is rehearsed anew, what grew less only where rehearsals take little time:
MUCH_LARGER = 1.5
#: at most one part in so many.
SHARE = 10.0
#: What a rehearsal takes for a while.
REHEARSAL_NBYTES = 16 << 20


@dataclass(frozen=True)
class Need:
    """What a forward holds beside weights and what was held before it, in bytes.

    `nbytes` with room for kernels and heap, `certain_nbytes` of results alone (0: it was not rehearsed); of
    inputs and caches of so many bytes.
    """

    nbytes: int
    certain_nbytes: int
    inputs_nbytes: int
    cached_nbytes: int


class Needs:
    """Foresees the forwards of one stage. Compute thread only; `clock` is replaced in tests."""

    def __init__(self, prepared: Prepared, clock: Callable[[], float] = time.perf_counter) -> None:
        self._prepared = prepared
        self._clock = clock
        #: By path of the module called, and whether a cache was given; None where it cannot run without data.
        self._known: dict[tuple[str, bool], Need | None] = {}
        self._inputs: dict[str, frozenset[str]] = {}
        self._most: dict[str, int] = {}
        self._rehearsed_s = float("-inf")
        self._took_s = 0.0

    def know(self, call: Call, rehearsal: Rehearsal | None, path: str = "") -> Need | None:
        """Take note of what a rehearsal of a call showed."""
        inputs, cached = self._sizes(call, path)
        need = None
        if rehearsal is not None:
            certain = rehearsal.peak_nbytes - WORKSPACE_NBYTES
            need = Need(rehearsal.activations_nbytes, certain, inputs, cached)
        self._known[path, cached > 0] = need
        return need

    def foresee(
        self,
        call: Call,
        path: str,
        fits: Callable[[int], bool],
        can_hold: Callable[[int], bool],
        may_rehearse: Callable[[], bool],
    ) -> Need | None:
        """Return what a call of the module at `path` needs; None where that cannot be told without data.

        `fits` says whether so many bytes leave the plan as it is: what does is not found out exactly. What no
        plan `can_hold` always is.
        `may_rehearse` is asked where it does not: rehearsing takes memory itself.
        """
        inputs, cached = self._sizes(call, path)
        known = self._known.get((path, cached > 0)) or self._known.get((path, False))
        if known is None:
            is_new = (path, cached > 0) not in self._known and (path, False) not in self._known
            return self._rehearse(call, path) if is_new and may_rehearse() else None
        is_alike = cached == 0 or known.cached_nbytes > 0
        if is_alike and inputs <= LARGER * known.inputs_nbytes and cached <= LARGER * known.cached_nbytes:
            return known
        ratio = max(1.0, inputs / max(1, known.inputs_nbytes))
        most = int(known.nbytes * ratio**2) + max(0, cached - known.cached_nbytes)
        # What was certain of less is certain of more.
        certain = known.certain_nbytes if is_alike and inputs >= known.inputs_nbytes else 0
        bound = Need(most, certain, inputs, cached)
        if fits(most):
            return bound
        much = not is_alike or ratio > MUCH_LARGER or cached > MUCH_LARGER * known.cached_nbytes
        due = self._clock() - self._rehearsed_s > SHARE * self._took_s
        if (much or due or not can_hold(most)) and may_rehearse():
            return self._rehearse(call, path) or bound
        return bound

    def larger(self, call: Call, path: str) -> float:
        """Return how much larger the inputs of a call are than any before it, 1 where they are not."""
        inputs, _ = self._sizes(call, path)
        before, self._most[path] = self._most.get(path, 0), max(self._most.get(path, 0), inputs)
        return max(1.0, inputs / before) if before else 1.0

    def _rehearse(self, call: Call, path: str) -> Need | None:
        begin = self._clock()
        elsewhere = in_fork if needs_imports() else None
        prepared = self._prepared
        rehearsal = rehearse(prepared.module, call, prepared.empty_weight, path, elsewhere=elsewhere)
        self._rehearsed_s = self._clock()
        self._took_s = self._rehearsed_s - begin
        gc.collect()  # what it left in cycles
        return self.know(call, rehearsal, path)

    def _sizes(self, call: Call, path: str) -> tuple[int, int]:
        """Return the bytes of a call's inputs, and of what nested in them was not in the first call."""
        found = {where: tensor.nbytes for where, tensor in tensors_in((call.args, call.kwargs))}
        first = self._inputs.setdefault(path, frozenset(found))
        cached = sum(n for where, n in found.items() if where not in first and _is_nested(where))
        return sum(found.values()) - cached, cached


def _is_nested(where: str) -> bool:
    """Return whether a tensor lies inside an argument, as a cache's do."""
    return where.count("[") + where.count(".") > 2
