"""A device that is not here, to plan for: what is assumed of it is said, and nothing can run on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor

from blockstream.engine.store import Fence
from blockstream.errors import ConfigError

from .protocol import DeviceMemory, Speeds

#: What a process holds on a CUDA device beside its allocator: 0.53 to 0.6 GiB were measured on an H100.
OUTSIDE_NBYTES = 600 << 20
#: A link of PCIe 4 x8, and the products of a card of 8 GB.
SPEEDS = Speeds(12e9, 40e12)
#: No device has more.
MOST_NBYTES = 1 << 42


class ImaginedDevice:
    """A `Device` for plans alone. Its budget has to be bytes: what is free on it nobody knows."""

    def __init__(self, name: str) -> None:
        self.name = f"{name} (none is here)"
        self.where = torch.device("cpu")
        self.host_nbytes = 160 << 20
        self.speeds = SPEEDS

    def memory(self) -> DeviceMemory:
        """Return what is assumed."""
        return DeviceMemory(MOST_NBYTES, MOST_NBYTES, 0, 0, OUTSIDE_NBYTES, others_nbytes=0)

    def empty(self, nbytes: int) -> Tensor:
        """Refuse."""
        self._refuse()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Fence:
        """Refuse."""
        self._refuse()

    def copies_wait(self, fence: Fence) -> None:
        """Refuse."""
        self._refuse()

    def compute_waits(self, fence: Fence) -> None:
        """Refuse."""
        self._refuse()

    def computed(self) -> Fence:
        """Refuse."""
        self._refuse()

    def stamp(self, queue: Literal["copies", "compute"]) -> NoReturn:
        """Refuse."""
        self._refuse()

    def register(self, address: int, nbytes: int) -> str | None:
        """Refuse."""
        self._refuse()

    def unregister(self, address: int) -> None:
        """Refuse."""
        self._refuse()

    def forget_peak(self) -> None:
        """Do nothing: nothing was held."""

    def limit(self, nbytes: int) -> None:
        """Refuse."""
        self._refuse()

    def synchronise(self) -> None:
        """Do nothing: nothing is under way."""

    def _refuse(self) -> NoReturn:
        raise ConfigError(f"device {self.name}: it can be planned for, and nothing runs on it")
