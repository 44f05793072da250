"""Where a streamed run first differs from the resident one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockstream.errors import BlockstreamError


@dataclass(frozen=True)
class Difference:
    """The first call whose result, or weights, are not bit for bit the same.

    `segment` None is the stage's module itself, or a table of it. `call` counts that segment's calls from
    1. `what` is the output, a parameter, the order of calls. `max_abs` is the largest absolute difference;
    None where there is none to state. `note` says more.
    """

    stage: str
    segment: str | None
    call: int
    what: str
    max_abs: float | None
    note: str = ""

    def __str__(self) -> str:
        where = f"stage {self.stage!r}" + (f", segment {self.segment!r}" if self.segment else "")
        apart = "" if self.max_abs is None else f" by at most {self.max_abs:.3g}"
        note = f"; {self.note}" if self.note else ""
        return f"{where}, call {self.call}: {self.what} differs{apart}{note}"


class DifferenceError(BlockstreamError):
    """Ends a run at its first difference: call number `index` of the run, which returned `output`."""

    def __init__(self, difference: Difference, index: int = -1, output: Any = None) -> None:
        super().__init__(str(difference))
        self.difference, self.index, self.output = difference, index, output
