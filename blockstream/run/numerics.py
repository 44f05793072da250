"""What `auto` comes to on this machine for what can change a bit of the result, or is refused here."""

from __future__ import annotations

import logging
import os

from blockstream.budget.amounts import headroom_part
from blockstream.errors import ConfigError
from blockstream.system.limits import cpu_count

from .config import RunConfig

log = logging.getLogger(__name__)


def pinned(config: RunConfig, planning: bool = False) -> RunConfig:
    """Return the config with its numerics written out: device, compute threads and products of int8.

    Raises ConfigError for a device that is not here, unless it is `planning` alone, and for a device's budget
    without a device.
    """
    from blockstream.device import choose
    from blockstream.module.layers.int8 import resolve

    device, device_budget = choose.resolve(config.device, planning), config.device_budget
    if device == "cpu" and device_budget != "auto":
        if config.device == "cpu":
            raise ConfigError(
                f"device_budget: {device_budget}: device is cpu, and nothing is held elsewhere; name a "
                "device, such as cuda, or leave device_budget out"
            )
        log.warning("there is no device here: device_budget %s bounds nothing", device_budget)
        device_budget = "auto"
    if device != "cpu" and headroom_part(device_budget) is not None and not choose.devices_here():
        raise ConfigError(
            f"device_budget: {device_budget}: a part of what is free on {device}, and none is here to ask; "
            "write an amount, such as 8GB"
        )
    threads = _threads() if config.threads == "auto" else config.threads
    found = {
        "device": device,
        "device_budget": device_budget,
        "threads": threads,
        "int8": resolve(config.int8, on_device=device != "cpu"),
    }
    return config.model_copy(update=found)


def _threads() -> int:
    """Return how many threads compute where the config does not say: OMP_NUM_THREADS, else the processors."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if said.isascii() and said.isdigit() and int(said) > 0:
        return int(said)
    if said:
        log.warning("OMP_NUM_THREADS is %r, which is no number of threads: it is left aside", said)
    return cpu_count().threads
