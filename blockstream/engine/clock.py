"""Time and waiting as the engine sees them, so that a test can bring its own."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Where the engine's time and its one condition come from."""

    def now(self) -> float:
        """Return seconds that never go back."""

    def condition(self) -> threading.Condition:
        """Return the condition the loader and the compute thread share."""

    def thread(self, thread: threading.Thread) -> threading.Thread:
        """Take note of a thread before it starts; return it."""


class SystemClock:
    """Real time."""

    def now(self) -> float:
        """Return seconds that never go back."""
        return time.perf_counter()

    def condition(self) -> threading.Condition:
        """Return a plain condition."""
        return threading.Condition()

    def thread(self, thread: threading.Thread) -> threading.Thread:
        """Return the thread unchanged."""
        return thread
