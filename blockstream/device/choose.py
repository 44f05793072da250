"""Which device a user means."""

from __future__ import annotations

import re

import torch

from blockstream.errors import ConfigError

from .cuda import CudaDevice
from .protocol import Device

#: Devices of torch that have no tier of ours, and what one would need.
_WITHOUT = {
    "mps": "unified memory would be one tier whose extents both processors see; set device: cpu",
    "xpu": "it would need streams, events and registered memory as cuda has them; set device: cpu",
}


def choose_device(device: str | Device | None) -> Device | None:
    """Return the device that compute is to run on; None for the processor.

    "auto" takes cuda where torch has one. Raises ConfigError for what there is no tier for.
    """
    if device is None or device == "cpu":
        return None
    if not isinstance(device, str):
        return device
    if device == "auto":
        return CudaDevice() if torch.cuda.is_available() else None
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        return CudaDevice(int(match[1] or 0))
    kind = device.split(":")[0]
    if kind in _WITHOUT:
        raise ConfigError(f"device {device!r}: blockstream does not compute there yet: {_WITHOUT[kind]}")
    raise ConfigError(f"device {device!r}: write cpu, cuda, cuda:1 or auto")
