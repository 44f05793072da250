"""What a device and its link give: what is free, and copies out of registered and pageable memory."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from blockstream.budget.amounts import AUTO_PERCENT
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent
from blockstream.system.limits import cpu_count

from .budget import DeviceBudget
from .protocol import Device
from .rooms import PinnedArena

#: What is copied in all, and at a time.
NBYTES = 256 << 20
PIECE_NBYTES = 32 << 20
ROUNDS = 3


def device_facts(device: Device, nbytes: int = NBYTES) -> dict[str, Any]:
    """Return a device's name, memory, budget by `auto` and its link's speed, as plain values.

    `refused` is why host memory cannot be registered, None where it can; copies are then pageable.
    """
    budget = DeviceBudget(device)
    host = Arena(nbytes)
    pinned = PinnedArena(host, device)
    host.commit([Extent(0, nbytes)], cpu_count().threads)
    to, source = device.empty(nbytes), pinned.tensor(Extent(0, nbytes))

    def speed() -> float:
        found = []
        for _ in range(ROUNDS):
            device.synchronise()
            begin = time.perf_counter()
            for at in range(0, nbytes, PIECE_NBYTES):
                piece = slice(at, at + PIECE_NBYTES)
                device.copy([(to[piece], source[piece])])
            device.synchronise()
            found.append(nbytes / max(time.perf_counter() - begin, 1e-9))
        return max(found)

    pageable = speed()
    pinned.register(nbytes)
    registered = None if pinned.refused else speed()
    pinned.unregister()
    return {
        "name": device.name,
        "memory": asdict(device.memory()),
        "budget": {
            "auto_percent": AUTO_PERCENT,
            "nbytes": budget.nbytes,
            "runtime_nbytes": budget.base_nbytes,
        },
        "link": {
            "registered_bytes_per_s": registered,
            "pageable_bytes_per_s": pageable,
            "refused": pinned.refused,
        },
    }
