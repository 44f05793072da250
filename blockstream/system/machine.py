"""What is known of this machine: memory, processors, disk and versions, as plain values."""

from __future__ import annotations

import platform
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .limits import cpu_count, headroom, page_cache_nbytes
from .memory import held
from .probe import disk

#: The distributions whose versions matter to a run.
PACKAGES = (
    "blockstream-engine",
    "numpy",
    "psutil",
    "torch",
    "transformers",
    "diffusers",
    "safetensors",
    "av",
    "matplotlib",
)


def doctor_facts(path: Path | str = ".", measure: bool = True) -> dict[str, Any]:
    """Return what is known of this machine as plain values for JSON; byte counts are integers.

    Keys: system, memory, held, cpu, disk (None without `measure`), versions (None: not installed).
    Nothing heavy is imported: versions are read from package metadata.
    """
    room, cpu = headroom(), cpu_count()
    return {
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "memory": {
            **{k: v for k, v in asdict(room).items() if k != "limits"},
            "limits": [{**asdict(l), "free_nbytes": l.free_nbytes} for l in room.limits],
            "page_cache_nbytes": page_cache_nbytes(),
        },
        "held": asdict(held()),
        "cpu": asdict(cpu),
        "disk": disk(path).as_dict() if measure else None,
        "versions": versions(),
    }


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of the distributions that matter to a run, None where not installed."""
    return {name: version(name) for name in PACKAGES}


@lru_cache
def version(package: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
