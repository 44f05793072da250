"""What a run takes, as Ray's resources, and how many of it a cluster has room for. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from blockstream.errors import ConfigError
from blockstream.plugins import Needs


def options_of(needs: Needs, device_memory: int) -> dict[str, Any]:
    """Return the options of a Ray task that takes what a run does.

    Memory is Ray's `memory` in bytes. Device memory is a fraction of a GPU, rounded up to the ten
    thousandths that Ray counts in, so that runs beside each other on one never take more than it has.
    Raises ConfigError for a budget that is a part of what is free, and for a device of unknown size.
    """
    if needs.nbytes is None:
        raise ConfigError(
            "budget: a part of what is free cannot be reserved on a cluster; name an amount, such as "
            "--set budget=3.3GiB"
        )
    found: dict[str, Any] = {"num_cpus": needs.threads, "memory": needs.nbytes}
    if needs.device_nbytes:
        if device_memory < needs.device_nbytes:
            raise ConfigError(
                f"a run takes {needs.device_nbytes:,} bytes of a device; device_memory is {device_memory:,}: "
                "say how much each GPU of the cluster has, --on '{name: ray, device_memory: 80000000000}'"
            )
        found["num_gpus"] = math.ceil(10_000 * needs.device_nbytes / device_memory) / 10_000
    return found


def room(taken: Mapping[str, Any], nodes: Iterable[Mapping[str, float]]) -> int:
    """Return how many runs that take so much have room on nodes of such resources together."""
    names = {"num_cpus": "CPU", "memory": "memory", "num_gpus": "GPU"}
    found = 0
    for node in nodes:
        found += min(int(node.get(names[key], 0) / amount) for key, amount in taken.items() if amount)
    return found
