"""Numbers that are not finite, found where they arise: a picture made of them would be black, or noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockstream.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

HINT = "weights that overflow in half precision are the usual cause: try dtype bf16, or fp32"


def not_finite(value: Tensor) -> str | None:
    """Return in words how much of a tensor is not finite and where the first is, None where all is."""
    if not value.is_floating_point() or bool(value.isfinite().all()):
        return None
    wrong = ~value.isfinite()
    first = [int(i) for i in wrong.nonzero()[0]]
    number = float(value[tuple(first)])
    return (
        f"{int(wrong.sum()):,} of {value.numel():,} numbers are not finite, the first, {number}, at {first}"
    )


class Finite:
    """Checks what a run makes. With `allowed` it warns, once for each thing that it is told of.

    `trace` says of a call that is made again which module's numbers are the first that are not finite: only
    what fails is looked at so closely.
    """

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        self.trace: Callable[[Callable[[], object]], str | None] = lambda again: None
        self._told: set[str] = set()

    def check(self, what: str, value: Tensor, again: Callable[[], object] | None = None) -> Tensor:
        """Return the tensor. Raises NonFiniteError naming it, unless that is allowed.

        `again` makes it once more: for the error to name the module where it went wrong.
        """
        found = not_finite(value)
        if found is not None:
            self.refuse(f"{what}: {found}", again)
        return value

    def refuse(self, said: str, again: Callable[[], object] | None = None) -> None:
        """Raise NonFiniteError, or warn where that is allowed."""
        if not self.allowed:
            where = None if again is None else self.trace(again)
            said += f"; they begin in {where}" if where is not None else ""
            raise NonFiniteError(f"{said}; {HINT}, or keep what comes out with --allow-nonfinite")
        if said not in self._told:
            self._told.add(said)
            log.warning("%s; kept, as allowed", said)
