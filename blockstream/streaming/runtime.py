"""What a stage knows of the session that runs it: whose turn it is, and passes."""

from __future__ import annotations

from typing import Protocol

from blockstream.module.faking import Call

from .visits import Pass


class Runtime(Protocol):
    """Where a stage's hooks lead; named by stage, so that a stage holds no more than this."""

    def enter(self, stage: str, call: Call, path: str) -> None:
        """Make the calling thread and a stage the ones that compute: the module at `path` is called.

        At the first call of all what was declared is planned and reading begins; the stage may be given
        another cut. Raises ModelError where another thread, or another stage, computes.
        """

    def leave(self) -> None:
        """Let others compute."""

    def is_inside(self) -> bool:
        """Return whether the calling thread computes."""

    def begin_pass(self, stage: str, call: Call, path: str) -> Pass:
        """Begin a pass with memory for what the call needs; BudgetError where there is not enough."""
