"""Numbers that are not finite, found where they arise: a picture made of them would be black, or noise."""

from __future__ import annotations

import logging
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
    """Checks what a run makes. With `allowed` it warns, once for each thing that it is told of."""

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        self._told: set[str] = set()

    def check(self, what: str, value: Tensor) -> Tensor:
        """Return the tensor. Raises NonFiniteError naming it, unless that is allowed."""
        found = not_finite(value)
        if found is not None:
            self.refuse(f"{what}: {found}")
        return value

    def refuse(self, said: str) -> None:
        """Raise NonFiniteError, or warn where that is allowed."""
        if not self.allowed:
            raise NonFiniteError(f"{said}; {HINT}, or keep what comes out with --allow-nonfinite")
        if said not in self._told:
            self._told.add(said)
            log.warning("%s; kept, as allowed", said)
