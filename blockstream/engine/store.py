"""Where segments come from: the one seam between the engine and what lies below it.

A `Store` begins a load and gives back a `Loading`, which ends in a `Handle` or is given up. `FileStore`
(files into the arena) lives in `blockstream.checkpoint`, `UploadStore` (an engine below into a device's
memory) in `blockstream.device`; stores of compiled models have room of their own and leave the extent be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Protocol

from blockstream.plan.loads import Load


class Fence(Protocol):
    """Work of a device that is on its way: what must be over before memory may be read or written."""

    def is_over(self) -> bool:
        """Return whether the work is over, without waiting."""

    def wait(self) -> None:
        """Return once the work is over."""


class Handle(Protocol):
    """A loaded segment."""

    def read(self) -> None:
        """Have what the calling thread computes from now on begin once the segment's bytes are there.

        The host does not wait: a device does, and `release` then says when it is done with them.
        """

    def release(self) -> None:
        """Give the segment up.

        Called once: by the compute thread, or by the loader thread if it was dropped while it was read.
        """


class Loading(Protocol):
    """A load that has begun. It ends by one of the two, called once."""

    def finish(self, nearly: Callable[[], None]) -> Handle:
        """Return the segment once it is there, or on its way to a device; what is wrong is raised here.

        `nearly` is called when the last of the work is on its way, and again as it is done: a load begun
        then keeps the disk busy.
        """

    def abandon(self) -> None:
        """Give the load up; nothing writes into its extent afterwards."""


class Store(Protocol):
    """Loads segments.

    Called by the loader thread: one load ends after another, the next may begin before. `load` says which
    visit of which segment it is for and the extent of the arena its bytes go to, which overlaps none in
    use; a store that has room of its own leaves the extent be.
    """

    def begin(self, load: Load) -> Loading:
        """Begin to load a segment and return at once; it comes after all that was begun before."""

    def close(self) -> None:
        """Release everything the store holds: descriptors, threads, maps."""


class Whole:
    """A load that cannot begin early: all of it happens at its end. A `Loading`."""

    def __init__(self, load: Callable[[], Handle]) -> None:
        self._load = load

    def finish(self, nearly: Callable[[], None]) -> Handle:
        """Load it now."""
        return self._load()

    def abandon(self) -> None:
        """Do nothing: nothing has begun."""


#: What makes a store of another one: it loads some segments its own way and passes the rest on.
StoreAround = Callable[[Store], Store]


class StagesStore:
    """Loads some stages' segments by stores of their own around one that loads all others. A `Store`."""

    def __init__(self, files: Store, arounds: Mapping[str, StoreAround]) -> None:
        """`arounds`: what makes a stage's store, by the stage's name."""
        self._files = files
        self._own = {stage: around(files) for stage, around in arounds.items()}

    def begin(self, load: Load) -> Loading:
        """Begin a load of a stage's store."""
        return self._own.get(load.stage, self._files).begin(load)

    def close(self) -> None:
        """Close each store, also where another's close fails; the one they are around comes last."""
        with ExitStack() as stack:
            for store in (self._files, *self._own.values()):
                stack.callback(store.close)
