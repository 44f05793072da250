"""What `auto` comes to on this machine for what can change a bit of the result, or is refused here."""

from __future__ import annotations

import logging
import os

from blockstream.errors import ConfigError
from blockstream.system.limits import cpu_count

from .config import RunConfig

log = logging.getLogger(__name__)

#: What `device:` may name; the rest is refused by name.
DEVICES = ("auto", "cpu")


def pinned(config: RunConfig) -> RunConfig:
    """Return the config with its numerics written out: compute threads and products of int8."""
    from blockstream.module.layers.int8 import resolve

    if config.device not in DEVICES:
        raise ConfigError(
            f"device: {config.device}: a run computes on {' or '.join(DEVICES)} here; leave device out"
        )
    threads = _threads() if config.threads == "auto" else config.threads
    return config.model_copy(update={"threads": threads, "int8": resolve(config.int8)})


def _threads() -> int:
    """Return how many threads compute where the config does not say: OMP_NUM_THREADS, else the processors."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if said.isascii() and said.isdigit() and int(said) > 0:
        return int(said)
    if said:
        log.warning("OMP_NUM_THREADS is %r, which is no number of threads: it is left aside", said)
    return cpu_count().threads
