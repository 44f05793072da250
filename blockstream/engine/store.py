"""Where segments come from: the one seam between the engine and storage.

The engine knows a `Store` only: `load(segment, room)` brings a segment in and returns a `Handle`,
`Handle.release()` gives it up. A store that can begin a load while another ends, so that the disk never
waits between two, has `begin` as well. `FileStore` (files into the arena) lives in
`blockstream.checkpoint`; stores of compiled models have no room of ours and get `None`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import NoReturn, Protocol, runtime_checkable

from blockstream.plan.segments import Extent


@runtime_checkable
class Handle(Protocol):
    """A loaded segment."""

    def release(self) -> None:
        """Give the segment up.

        Called once: by the compute thread, or by the loader thread if it was dropped while it was read.
        """


@runtime_checkable
class Store(Protocol):
    """Loads segments by key.

    `load` is called by the loader thread, one call at a time, never for a room that overlaps one
    still in use. It blocks until the bytes are there, and raises `SegmentLoadError` otherwise.
    """

    def load(self, stage: str, segment: str, room: Extent | None) -> Handle:
        """Return the segment, its bytes at `room` of the arena when there is one."""

    def close(self) -> None:
        """Release everything the store holds: descriptors, threads, maps."""


class Loading(Protocol):
    """A load that has begun: its bytes are on their way. It ends by one of the two, called once."""

    def finish(self, nearly: Callable[[], None]) -> Handle:
        """Return the segment, as `Store.load` does, whatever is wrong with it raised here.

        `nearly` is called when its last reads are on their way, and again as they arrive: a load begun
        then keeps the disk busy.
        """

    def abandon(self) -> None:
        """Give the load up; nothing writes into its room afterwards."""


@runtime_checkable
class OverlappingStore(Store, Protocol):
    """A store that can begin a load while the one before it ends."""

    def begin(self, stage: str, segment: str, room: Extent | None) -> Loading:
        """Begin to load a segment and return at once; what is read comes after all that was begun before."""


class _Whole:
    """A load by a store that cannot begin one early: all of it happens at its end. A `Loading`."""

    def __init__(self, load: Callable[[], Handle]) -> None:
        self._load = load

    def finish(self, nearly: Callable[[], None]) -> Handle:
        return self._load()

    def abandon(self) -> None:
        pass


def begin(store: Store, stage: str, segment: str, room: Extent | None) -> Loading:
    """Begin a load where the store can, else leave it to the end. Raises nothing: `finish` does."""
    try:
        if isinstance(store, OverlappingStore):
            return store.begin(stage, segment, room)
    except Exception as error:
        return _Whole(partial(_raise, error))
    return _Whole(partial(store.load, stage, segment, room))


def _raise(error: Exception) -> NoReturn:
    raise error


#: What makes a store of another one: it loads some segments its own way and passes the rest on.
StoreAround = Callable[[Store], Store]


class Stored(Protocol):
    """A stage that may have a store of its own."""

    name: str
    around: StoreAround | None


class StagesStore:
    """Loads some stages' segments by stores of their own around one that loads all others. Overlaps them."""

    def __init__(self, files: Store, stages: Iterable[Stored]) -> None:
        self._files = files
        self._own = {stage.name: stage.around(files) for stage in stages if stage.around is not None}

    def load(self, stage: str, segment: str, room: Extent | None) -> Handle:
        """Return the segment from its stage's store."""
        return self._own.get(stage, self._files).load(stage, segment, room)

    def begin(self, stage: str, segment: str, room: Extent | None) -> Loading:
        """Begin a load of a stage's store."""
        return begin(self._own.get(stage, self._files), stage, segment, room)

    def close(self) -> None:
        """Close each store, also where another's close fails; the one they are around comes last."""
        with ExitStack() as stack:
            for store in (self._files, *self._own.values()):
                stack.callback(store.close)
