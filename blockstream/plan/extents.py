"""Which bytes of the arena are in use."""

from __future__ import annotations

from bisect import bisect_left, insort

from .segments import Extent


class LiveExtents:
    """The extents in use, disjoint, sorted by offset."""

    def __init__(self) -> None:
        self._sorted: list[Extent] = []
        #: Their sum.
        self.nbytes = 0

    def add(self, extent: Extent) -> None:
        """Take an extent that is free."""
        if extent.nbytes:
            insort(self._sorted, extent)
            self.nbytes += extent.nbytes

    def remove(self, extent: Extent) -> None:
        """Give an extent back."""
        if extent.nbytes:
            at = bisect_left(self._sorted, extent)
            assert self._sorted[at] == extent, "an extent is freed once"
            del self._sorted[at]
            self.nbytes -= extent.nbytes

    def is_free(self, extent: Extent) -> bool:
        """Return whether no extent in use overlaps this one, in O(log n)."""
        if not extent.nbytes:
            return True
        at = bisect_left(self._sorted, extent)
        around = self._sorted[max(at - 1, 0) : at + 1]
        return not any(live.overlaps(extent) for live in around)
