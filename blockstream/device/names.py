"""What a user may write as a device, checked without torch."""

from __future__ import annotations

import re

from blockstream.errors import ConfigError

#: What may be written: the processor, a CUDA device, or `auto`, which is cuda where torch has one.
PATTERN = r"^(auto|cpu|cuda(:[0-9]+)?)$"

#: Devices of torch that have no tier of ours, and what one would need.
_WITHOUT = {
    "mps": "unified memory would be one tier whose extents both processors see",
    "xpu": "it would need streams, events and registered memory as cuda has them",
    "hpu": "it would need streams, events and registered memory as cuda has them",
    "npu": "it would need streams, events and registered memory as cuda has them",
    "xla": "it compiles whole graphs, and weights would have to change place between their nodes",
    "meta": "it has no memory, so nothing could be computed",
}


def parse_device(device: object) -> str:
    """Return a device's name as written. Raises ConfigError for what there is no tier for, by its name."""
    if isinstance(device, str) and re.match(PATTERN, device):
        return device
    kind = device.split(":")[0] if isinstance(device, str) else ""
    if kind in _WITHOUT:
        raise ConfigError(
            f"{device!r}: blockstream does not compute there yet: {_WITHOUT[kind]}; write cpu, or auto"
        )
    raise ConfigError(f"{device!r} is no device; write auto, cpu, cuda or cuda:1")


def index_of(device: str) -> int:
    """Return the number of a CUDA device: 1 of "cuda:1", 0 of "cuda"."""
    return int(device.partition(":")[2] or 0)
