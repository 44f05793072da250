"""What to do about what `doctor` found: one line each, a command where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.system.cache import cache_folder

from .extras import DISTRIBUTION

#: A sharded checkpoint and the libraries around it have about a hundred files open.
LEAST_FILES = 256
#: Below this much free memory nothing but the embedded model runs.
LITTLE_NBYTES = 1 << 30
#: A disk that reads slower bounds every run on it.
SLOW_BYTES_PER_S = 200e6


def hints(facts: dict[str, Any]) -> Iterator[str]:
    """Yield what would mend or speed up something, the most pressing first."""
    if not facts["versions"].get("torch"):
        yield f"torch is not installed: pip install {DISTRIBUTION}"
    memory = facts["memory"]
    if memory["nbytes"] < LITTLE_NBYTES:
        yield (
            f"{format_nbytes(memory['nbytes'])} of memory are free under {memory['source']}: "
            "close programs, or raise that limit"
        )
    yield from _of_cuda(facts)
    yield from _of_files()
    yield from _of_disk(facts["disk"])
    for extra, names in facts["missing"].items():
        yield f"{', '.join(names)} missing: pip install '{DISTRIBUTION}[{extra}]'"


def _of_cuda(facts: dict[str, Any]) -> Iterator[str]:
    torch = facts["versions"].get("torch") or ""
    if any(device["kind"] == "cuda" for device in facts["devices"]) and "+cpu" in torch:
        yield f"torch {torch} cannot use the GPU of this machine: install a build for CUDA, see pytorch.org"


def _of_files() -> Iterator[str]:
    try:
        import resource
    except ImportError:  # not on every system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        may = hard < 0 or hard >= LEAST_FILES
        how = f"ulimit -n {LEAST_FILES}" if may else f"the system allows {hard}; have that raised"
        yield f"only {soft} files may be open at once: {how}"


def _of_disk(disk: dict[str, Any] | None) -> Iterator[str]:
    folder = cache_folder()
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        yield f"{folder} cannot be written, so nothing measured is kept: export BLOCKSTREAM_CACHE=FOLDER"
    if disk is None:
        return
    if disk["file_system"]["fstype"] in ("tmpfs", "ramfs"):
        yield f"{disk['path']} is held in memory: keep checkpoints on a disk"
    speeds = [best["bytes_per_s"] for best in (disk["direct"], disk["buffered"]) if best is not None]
    if speeds and max(speeds) < SLOW_BYTES_PER_S:
        yield f"{disk['path']} reads at {max(speeds) / 1e6:.0f} MB/s: keep checkpoints on an SSD"
    usage = shutil.disk_usage(disk["path"])
    if usage.free < usage.total // 50:
        yield f"{disk['path']} has {format_nbytes(usage.free)} free: runs and packs need room"
