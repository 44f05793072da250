"""The course of the run in progress: its last sample, and the curve of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Points of the curve; when there are twice as many, every second one goes.
POINTS = 400


class Course:
    """What `blockstream run --json-lines` has told so far of one run. Its size is bounded."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._last: dict[str, Any] | None = None
        self._curve: list[list[float]] = []
        self._taken, self._stride = 0, 1

    def take(self, value: Any) -> dict[str, Any] | None:
        """Take note of a line and return it as pages are told it; None for another line."""
        if not isinstance(value, Mapping) or "held_nbytes" not in value:
            return None
        self._last = {"id": self.name, **value}
        if self._taken % self._stride == 0:
            self._curve.append([round(float(value["at_s"]), 2), int(value["held_nbytes"])])
        self._taken += 1
        if len(self._curve) >= 2 * POINTS:
            self._curve, self._stride = self._curve[::2], 2 * self._stride
        return self._last

    def public(self) -> dict[str, Any]:
        """Return all of it, for a page that has just come."""
        return {"id": self.name, "last": self._last, "curve": self._curve}
