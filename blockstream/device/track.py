"""What a device did when: copies over the link and visits, by pairs of stamps that its queues pass.

Stamps are read once they are over, at the end of a pass. The spans of the device's lane, "compute" and "wait"
(for a copy, or for the host), follow one another without a gap, as those of the host's compute thread do.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.plan.segments import Visit

from .protocol import Device, Stamp


class _Copy(NamedTuple):
    begin: Stamp
    end: Stamp
    label: str
    visit: Visit
    nbytes: int


class _Visited(NamedTuple):
    begin: Stamp
    end: Stamp
    label: str
    visit: Visit | None


class DeviceTrack:
    """The lanes "link" and "device" of a ledger. Copies are noted by one thread, visits by another."""

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self._device, self._ledger = device, ledger
        self._copies: deque[_Copy] = deque()
        self._visits: deque[_Visited] = deque()
        self._before = device.stamp("compute")
        self._begun: Stamp | None = None
        self._at: float | None = None

    def begun(self) -> None:
        """Take note that what computes from now on is the next visit's. Compute thread."""
        self._begun = self._device.stamp("compute")

    def executed(self, span: Span) -> None:
        """Take note that a visit was issued, which the host's `span` tells of. Compute thread."""
        end = self._device.stamp("compute")
        self._visits.append(_Visited(self._begun or self._before, end, span.label, span.visit))
        self._before, self._begun = end, None

    def copied(self, begin: Stamp, label: str, visit: Visit, nbytes: int) -> None:
        """Take note that a copy was issued, after `begin`. The thread that copies."""
        self._copies.append(_Copy(begin, self._device.stamp("copies"), label, visit, nbytes))

    def resolve(self) -> None:
        """Write down what is over. Compute thread."""
        zero_s = time.perf_counter() - self._ledger.now()
        while self._copies and self._copies[0].end.is_over():
            c = self._copies.popleft()
            self._add(
                "link", "copy", c.begin.at_s() - zero_s, c.end.at_s() - zero_s, c.label, c.visit, c.nbytes
            )
        while self._visits and self._visits[0].end.is_over():
            v = self._visits.popleft()
            begin_s, end_s = v.begin.at_s() - zero_s, v.end.at_s() - zero_s
            if self._at is None:
                self._at = begin_s
            begin_s = max(begin_s, self._at)
            if begin_s > self._at:
                self._add("device", "wait", self._at, begin_s, v.label, v.visit)
            self._add("device", "compute", begin_s, max(begin_s, end_s), v.label, v.visit)
            self._at = max(begin_s, end_s)

    def _add(
        self,
        lane: str,
        kind: str,
        begin_s: float,
        end_s: float,
        label: str,
        visit: Visit | None,
        nbytes: int = 0,
    ) -> None:
        self._ledger.add(Span(lane, kind, begin_s, max(begin_s, end_s), label, visit, nbytes))
