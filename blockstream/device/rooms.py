"""The two memories of a device's tier: the device's own, and host memory that it copies from by itself."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from blockstream.checkpoint.read.requests import Placed, SegmentLayout
from blockstream.engine.arena import Arena
from blockstream.engine.store import Fence
from blockstream.plan.layout import align_up
from blockstream.plan.segments import Extent

from .protocol import TENSOR_ALIGN, Device


class Readers:
    """Who reads which extents: one that was read is left with a fence, which copies into it wait for."""

    def __init__(self) -> None:
        self._left: list[tuple[Extent, Fence]] = []

    def leave(self, extent: Extent, fence: Fence) -> None:
        """Take note that an extent is read until a fence is over. Any thread."""
        self._left = [(x, f) for x, f in self._left if not f.is_over()] + [(extent, fence)]

    def readers(self, extent: Extent) -> list[Fence]:
        """Return what a copy into an extent has to wait for."""
        return [f for x, f in self._left if x.overlaps(extent) and not f.is_over()]


class DeviceArena(Readers):
    """One piece of a device's memory, addressed by extents."""

    def __init__(self, device: Device, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self._memory = device.empty(nbytes)
        self.address = self._memory.data_ptr()

    def view(self, extent: Extent) -> Tensor:
        """Return uint8 [nbytes], to copy into. ValueError if the extent leaves the arena."""
        if extent.offset < 0 or extent.end > self.nbytes:
            raise ValueError(f"{extent} leaves the device's arena of {self.nbytes} bytes")
        return self._memory[extent.offset : extent.end]

    def room(self, extent: Extent) -> Tensor:
        """Return uint8 [nbytes] with a storage of its own: who holds it is told apart from the rest."""
        view = self.view(extent)
        storage = torch._C._construct_storage_from_data_pointer(view.data_ptr(), view.device, extent.nbytes)
        return torch.empty(0, dtype=torch.uint8, device=view.device).set_(storage)


class PinnedArena:
    """An arena in host memory that is registered with a device once its pages are touched, as a whole.

    Pages given back while registered would leave the device with the old ones, silently: `discard` and
    `keep` end the registration first. Where it is refused copies are pageable, and `refused` says why.
    """

    def __init__(self, arena: Arena, device: Device) -> None:
        self.arena = arena
        self.refused: str | None = None
        self.registered_nbytes = 0
        self._device = device
        self._registering: Future[str | None] | None = None
        self._asked_nbytes = 0

    def register(self, nbytes: int, threads: int = 1) -> None:
        """Touch and register the first `nbytes`."""
        self.begin(nbytes, threads)
        self.settle()

    def begin(self, nbytes: int, threads: int = 1) -> None:
        """Touch the first `nbytes`, and begin to register them: what is read there meanwhile stays."""
        self.unregister()
        self.arena.commit([Extent(0, nbytes)], threads)
        self._asked_nbytes = nbytes
        pool = ThreadPoolExecutor(1, thread_name_prefix="blockstream-register")
        self._registering = pool.submit(self._device.register, self.arena.address, nbytes)
        pool.shutdown(wait=False)

    def settle(self) -> None:
        """Wait for a registration that has begun. Any thread; idempotent."""
        registering = self._registering
        if registering is not None:
            self.refused = registering.result()
            self.registered_nbytes = 0 if self.refused else self._asked_nbytes
            self._registering = None

    def unregister(self) -> None:
        """End the registration, after the copies under way. Idempotent."""
        self.settle()
        if self.registered_nbytes:
            self._device.synchronise()
            self._device.unregister(self.arena.address)
            self.registered_nbytes = 0

    def tensor(self, extent: Extent) -> Tensor:
        """Return uint8 [nbytes] to copy from."""
        return torch.frombuffer(self.arena.view(extent), dtype=torch.uint8)


@dataclass(frozen=True)
class DeviceLayout:
    """Where a segment's tensors lie on the device, relative to its extent, and what is copied there.

    `copies` are (offset on the device, offset in the host's room, bytes).
    """

    name: str
    nbytes: int
    tensors: Mapping[str, Placed]
    copies: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, host: SegmentLayout) -> DeviceLayout:
        """Return the layout of a segment whose host layout is given; tensors that share a place still do."""
        places: dict[int, int] = {}
        copies: list[tuple[int, int, int]] = []
        end = 0
        sizes: dict[int, int] = {}
        for placed in host.tensors.values():
            sizes[placed.offset] = max(sizes.get(placed.offset, 0), placed.nbytes)
        for source, nbytes in sorted(sizes.items()):
            if not nbytes:
                places[source] = 0
                continue
            at = align_up(end, TENSOR_ALIGN)
            places[source], end = at, at + nbytes
            if copies and copies[-1][0] - copies[-1][1] == at - source:
                first = copies.pop()
                copies.append((first[0], first[1], end - first[0]))
            else:
                copies.append((at, source, nbytes))
        tensors = {n: p._replace(offset=places[p.offset]) for n, p in host.tensors.items()}
        return cls(host.name, max(align_up(end), 1), tensors, tuple(copies))
