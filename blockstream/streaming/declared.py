"""A stage as it was declared, before anything is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from blockstream.checkpoint import Checkpoint
from blockstream.engine.store import StoreAround
from blockstream.module.faking import Call
from blockstream.module.prepared import Prepared
from blockstream.plan.segments import Passes


@dataclass(frozen=True)
class Declared:
    """What `Session.stage` was told: a module made ready, how many passes, at which pace.

    `inputs`: example inputs, None where none are given. `around` makes the stage's own store.
    `between_s`: what the caller does between two passes takes.
    """

    prepared: Prepared
    checkpoint: Checkpoint
    passes: Passes
    inputs: Call | None = None
    around: StoreAround | None = None
    pace: tuple[float, ...] = ()
    between_s: float = 0.0

    @property
    def name(self) -> str:
        """Return the stage's name."""
        return self.prepared.name
