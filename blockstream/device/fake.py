"""A device for tests on machines without one: its memory is torch's on the processor, its queues are lists.

Every copy ends as late as its fences allow, or as early: what does not wait for a fence it needs reads or
writes bytes that are not there yet, or no more. New memory is poisoned.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from blockstream.engine.store import Fence

from .protocol import DeviceMemory, Speeds

POISON = 0xAB


class _Work:
    """One thing that a queue does, after those before it and what it waits for. A `Fence`."""

    def __init__(
        self, device: FakeDevice, act: Callable[[], None], before: _Work | None, after: Sequence[_Work]
    ) -> None:
        self._device, self._act, self._before, self._after = device, act, before, tuple(after)
        self.over = False

    def is_over(self) -> bool:
        """Return whether it was done."""
        return self.over

    def wait(self) -> None:
        """Do it, and first all that it comes after."""
        with self._device.lock:
            self.do()
            self._device.advance()

    def could(self) -> bool:
        """Return whether all that it comes after is over."""
        return (self._before is None or self._before.over) and all(x.over for x in self._after)

    def do(self) -> None:
        """Do it, and first all that it comes after. The lock is held."""
        todo = [self]
        while todo:
            work = todo[-1]
            first = [x for x in (work._before, *work._after) if x is not None and not x.over]
            if first and not work.over:
                todo += first
                continue
            todo.pop()
            if not work.over:
                work._act()
                work.over, work._before, work._after = True, None, ()


class _Stamp:
    """Work that notes when it was done. A `Stamp`."""

    def __init__(self) -> None:
        self.work: _Work | None = None
        self.found_s = 0.0

    def note(self) -> None:
        self.found_s = time.perf_counter()

    def is_over(self) -> bool:
        return self.work is not None and self.work.over

    def wait(self) -> None:
        assert self.work is not None
        self.work.wait()

    def at_s(self) -> float:
        return self.found_s


class FakeDevice:
    """A `Device` of `nbytes` on the processor; `copies` end "late" or "early".

    What torch computes is over at once, since the processor does it. With `queued` it is a test's own
    (`compute`): done as early as its fences allow where copies end late, and the other way round.
    `refuses` is why memory cannot be registered.
    """

    def __init__(
        self,
        nbytes: int = 1 << 40,
        copies: Literal["late", "early"] = "late",
        *,
        queued: bool = False,
        refuses: str | None = None,
    ) -> None:
        self.name = "fake"
        self.where = torch.device("cpu")
        self.host_nbytes = 32 << 20
        self.speeds = Speeds(50e9, 400e12)
        self.lock = threading.RLock()
        self.registered: dict[int, int] = {}
        #: Bytes copied, and those of them that were issued out of memory that is not registered.
        self.copied_nbytes = self.pageable_nbytes = 0
        self._nbytes, self._queued, self._refuses = nbytes, queued, refuses
        self._eager = "copies" if copies == "early" else "compute"
        self._last: dict[str, _Work | None] = {"copies": None, "compute": None}
        self._wanted: dict[str, list[_Work]] = {"copies": [], "compute": []}
        self._waiting: list[_Work] = []
        self._reserved = self._peak = 0
        self._most: int | None = None

    # -- Device ------------------------------------------------------------------------------

    def empty(self, nbytes: int) -> Tensor:
        """Return poisoned memory."""
        if self._most is not None and self._reserved + nbytes > self._most:
            raise torch.OutOfMemoryError(f"fake: {nbytes} bytes beside {self._reserved} of {self._most}")
        self._reserved += nbytes
        self._peak = max(self._peak, self._reserved)
        made = torch.full((nbytes,), POISON, dtype=torch.uint8)
        weakref.finalize(made, self._give_back, nbytes)
        return made

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Fence:
        """Queue copies."""
        pairs = list(pairs)
        for _, source in pairs:
            if not any(at <= source.data_ptr() < at + n for at, n in self.registered.items()):
                self.pageable_nbytes += len(source)

        def act() -> None:
            for to, source in pairs:
                to.copy_(source)
                self.copied_nbytes += len(to)

        return self._queue("copies", act)

    def copies_wait(self, fence: Fence) -> None:
        """Have later copies wait."""
        self._wait_in("copies", fence)

    def compute_waits(self, fence: Fence) -> None:
        """Have later compute wait; what torch computes follows at once, so that is now."""
        if self._queued:
            self._wait_in("compute", fence)
        else:
            fence.wait()

    def computed(self) -> Fence:
        """Return when what is queued so far is over."""
        return self._queue("compute", lambda: None)

    def stamp(self, queue: Literal["copies", "compute"]) -> _Stamp:
        """Queue a look at the clock."""
        made = _Stamp()
        made.work = self._queue(queue, made.note)
        return made

    def register(self, address: int, nbytes: int) -> str | None:
        """Note a registration."""
        if self._refuses is None:
            assert address not in self.registered, "registered twice"
            self.registered[address] = nbytes
        return self._refuses

    def unregister(self, address: int) -> None:
        """Undo a registration."""
        assert all(x.over for x in self._waiting), "copies are under way"
        del self.registered[address]

    def memory(self) -> DeviceMemory:
        """Return the bytes that `empty` gave."""
        free = self._nbytes - self._reserved
        return DeviceMemory(self._nbytes, free, self._reserved, self._peak, 0, others_nbytes=0)

    def forget_peak(self) -> None:
        """Count from now on."""
        self._peak = self._reserved

    def limit(self, nbytes: int) -> None:
        """Refuse more than so many bytes."""
        self._most = nbytes

    def synchronise(self) -> None:
        """Do all that is queued."""
        for last in list(self._last.values()):
            if last is not None:
                last.wait()

    # -- for tests ---------------------------------------------------------------------------

    def compute(self, act: Callable[[], None]) -> Fence:
        """Queue compute of a test's own."""
        assert self._queued
        return self._queue("compute", act)

    def advance(self) -> None:
        """Do what may be done now of the queue that is done early. The lock is held."""
        while self._waiting and (self._waiting[0].over or self._waiting[0].could()):
            self._waiting.pop(0).do()

    # -- inside ------------------------------------------------------------------------------

    def _queue(self, queue: str, act: Callable[[], None]) -> _Work:
        with self.lock:
            work = _Work(self, act, self._last[queue], self._wanted[queue])
            self._wanted[queue] = []
            self._last[queue] = work
            if queue == "compute" and not self._queued:
                work.do()
            if queue == self._eager:
                self._waiting.append(work)
                self.advance()
            return work

    def _wait_in(self, queue: str, fence: Fence) -> None:
        assert isinstance(fence, _Work)
        with self.lock:
            if not fence.over:
                self._wanted[queue].append(fence)

    def _give_back(self, nbytes: int) -> None:
        self._reserved -= nbytes
