"""Whose turn it is: one thread computes in a session, in one stage."""

from __future__ import annotations

import threading

from blockstream.errors import ModelError


class Turns:
    """Gives one thread at a time the turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_free(self) -> bool:
        """Return whether nobody has the turn."""
        return self._owner is None

    def is_mine(self) -> bool:
        """Return whether the calling thread has it."""
        return self._owner == threading.get_ident()

    def take(self, stage: str) -> None:
        """Take the turn for a stage; ModelError if a thread has it, the calling one included."""
        me = threading.get_ident()
        with self._lock:
            if self._owner is not None and self._owner != me:
                raise ModelError(
                    f"stage {stage!r} is called while another thread computes in the same session; one "
                    "streamed module runs at a time: take turns, or open a session each"
                )
            if self._owner == me:
                raise ModelError(
                    f"stage {stage!r} is called inside the forward of another stage; make one module "
                    "of the two, or call them one after the other"
                )
            self._owner = me

    def give(self) -> None:
        """Give the turn back."""
        self._owner = None
