"""What a device is to the tiers: memory, copies that end in order, fences between copies and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from blockstream.engine.store import Fence

#: What addresses of weights on a device are multiples of: kernels may round differently at others.
TENSOR_ALIGN = 512


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: all there is, free now, held by this process's allocator now and at most.

    `outside_nbytes` is what the process holds beside its allocator (context, libraries); `others_nbytes`
    what other processes hold, None where the two cannot be told apart: it is then part of `outside_nbytes`.
    """

    total_nbytes: int
    free_nbytes: int
    reserved_nbytes: int
    peak_nbytes: int
    outside_nbytes: int
    others_nbytes: int | None


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a device is taken for before it is measured: bytes a second of its link, operations a second."""

    link: float
    flops: float


class Stamp(Fence, Protocol):
    """A fence that tells when a queue passed it."""

    def at_s(self) -> float:
        """Return the moment, as `time.perf_counter` has it, once it is over."""


class Device(Protocol):
    """Memory and two queues: copies into it, one after the other, and what computes. The host waits for none.

    `where` is the torch device that tensors lie on, `host_nbytes` what its libraries come to hold of host
    memory once a forward has used them. Copies are issued by one thread, compute by another.
    """

    name: str
    where: torch.device
    host_nbytes: int
    speeds: Speeds

    def empty(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] on the device, its address a multiple of `TENSOR_ALIGN`."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Fence:
        """Copy (to, from) pairs of uint8 [n] after all copies issued so far; return when they are over."""

    def copies_wait(self, fence: Fence) -> None:
        """Have the copies issued from now on begin once a fence is over."""

    def compute_waits(self, fence: Fence) -> None:
        """Have what the calling thread computes from now on begin once a fence is over."""

    def computed(self) -> Fence:
        """Return when all that the calling thread has computed so far is over."""

    def stamp(self, queue: Literal["copies", "compute"]) -> Stamp:
        """Return when all that was issued so far to a queue is over, of compute the calling thread's."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Let the device copy from touched host memory without the host; return why it cannot, else None."""

    def unregister(self, address: int) -> None:
        """Undo `register`; no copy from there is under way."""

    def memory(self) -> DeviceMemory:
        """Return what the device's memory holds now."""

    def forget_peak(self) -> None:
        """Have the most that the allocator held count from now on."""

    def limit(self, nbytes: int) -> None:
        """Have the allocator refuse what would take it beyond so many bytes."""

    def synchronise(self) -> None:
        """Return once everything issued is over."""
