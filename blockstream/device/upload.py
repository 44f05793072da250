"""UploadStore: segments from host memory into a device's. The store of the engine above.

Its loader thread is the compute side of the engine below: it fetches a segment there, has it copied and goes
on. What the host keeps is copied while the thread goes on; what only passes through is waited for, since
its room is the disk's again once the copy has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from blockstream.checkpoint.file_store import FileHandle
from blockstream.engine.engine import Engine
from blockstream.engine.store import Fence, Handle
from blockstream.plan.loads import Load
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Extent, Visit
from blockstream.plan.simulate_tiers import IN_FLIGHT

from .protocol import Device
from .rooms import DeviceArena, DeviceLayout, PinnedArena
from .track import DeviceTrack


class UploadHandle:
    """A segment in a device's memory, or on its way there. A `Handle`; compute thread, or the loader's."""

    def __init__(self, store: UploadStore, extent: Extent, ready: Fence) -> None:
        self._store, self._extent, self.ready = store, extent, ready
        #: Whether compute was told to wait for `ready`: it may read the segment.
        self.is_read = False

    def read(self) -> None:
        """Have the calling thread's compute wait until the segment is there."""
        if not self.is_read:
            self._store.device.compute_waits(self.ready)
            self.is_read = True
        if self._store.track is not None:
            self._store.track.begun()

    def release(self) -> None:
        """Give the extent up: the next copy into it waits for what was computed with it."""
        if self.is_read:
            self._store.arena.leave(self._extent, self._store.device.computed())


class Uploading:
    """A load of a segment into a device. A `Loading`: all of it happens at its end, by queueing copies."""

    def __init__(self, store: UploadStore, load: Load) -> None:
        self._store, self._load = store, load

    def finish(self, nearly: Callable[[], None]) -> UploadHandle:
        """Fetch the segment from the engine below, waiting for the disk, and have it copied."""
        return self._store.upload(self._load)

    def abandon(self) -> None:
        """Do nothing: nothing has begun."""


class UploadStore:
    """Copies what the engine below brings into host memory to a device. A `Store`.

    `layouts` maps (stage, segment) to where its tensors lie on the device. Closing it closes that engine.
    """

    def __init__(
        self,
        host: Engine,
        pinned: PinnedArena,
        device: Device,
        arena: DeviceArena,
        layouts: Mapping[tuple[str, str], DeviceLayout],
        track: DeviceTrack | None = None,
    ) -> None:
        self.host, self.pinned, self.device, self.arena = host, pinned, device, arena
        self._layouts, self.track = layouts, track
        #: Copies under way out of what the host keeps: when each is over, its visit there, its segment.
        self._flying: deque[tuple[Fence, Visit, tuple[int, int]]] = deque()
        #: What the engine below is to go on with.
        self._adopted: Plan | None = None
        #: Bytes that copies were issued for.
        self.copied_nbytes = 0

    def begin(self, load: Load) -> Uploading:
        """Begin a load. Loader thread."""
        return Uploading(self, load)

    def adopt(self, plan: Plan) -> None:
        """Have the engine below go on with another plan before its next visit. Compute thread."""
        self._adopted = plan

    def upload(self, load: Load) -> UploadHandle:
        """Return a segment that is on its way to the device. Loader thread."""
        plan, self._adopted = self._adopted, None
        if plan is not None and load.visit.position < len(plan.schedule.stages[load.visit.stage].order):
            self._land(None)
            self.host.adopt(plan, load.visit)
        self._land(load)
        visit, handle = self.host.fetch(load.visit, load.key[1])
        try:
            fence = self.queue(load, handle)
        except BaseException:
            self.host.release(visit)
            raise
        if self.host.plan.is_retained(visit):
            self._flying.append((fence, visit, load.key))
        else:
            fence.wait()
            self.host.release(visit)
        return UploadHandle(self, load.extent, fence)

    def close(self) -> None:
        """End the copies under way, then the engine below; give the registration up. Idempotent."""
        self.device.synchronise()
        try:
            self._land(None)
        finally:
            self.host.close()
            self.pinned.unregister()

    def queue(self, load: Load, handle: Handle) -> Fence:
        """Queue the copies of a segment, behind whoever still reads where it goes."""
        assert isinstance(handle, FileHandle), "the engine below loads files"
        layout = self._layouts[load.stage, load.segment.name]
        for fence in self.arena.readers(load.extent):
            self.device.copies_wait(fence)
        self.pinned.settle()
        room = self.pinned.tensor(handle.room)
        to = self.arena.view(Extent(load.extent.offset, layout.nbytes))
        nbytes = sum(n for _, _, n in layout.copies)
        self.copied_nbytes += nbytes
        begin = None if self.track is None else self.device.stamp("copies")
        fence = self.device.copy([(to[at : at + n], room[src : src + n]) for at, src, n in layout.copies])
        if self.track is not None and begin is not None:
            self.track.copied(begin, load.segment.name, load.visit, nbytes)
        return fence

    def _land(self, load: Load | None) -> None:
        """End the visits below whose copies are over, and wait for those that `load` cannot go beside.

        It may go beside those of other segments of its stage, whose rooms are apart, where it comes next.
        """
        comes = load is not None and self.host.comes(load.visit, load.key[1])
        while self._flying:
            fence, visit, _ = self._flying[0]
            beside = comes and all(
                key != load.key and key[0] == load.key[0] for _, _, key in self._flying if load is not None
            )
            if beside and len(self._flying) < IN_FLIGHT and not fence.is_over():
                return
            fence.wait()
            self._flying.popleft()
            self.host.release(visit)
