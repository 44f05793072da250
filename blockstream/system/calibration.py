"""What was measured here before: seconds a load and a visit took, for the next plan to start from.

One small JSON file a fact in the cache folder, named by a hash of what the fact depends on. Loads
depend on machine, disk and checkpoint; execution on machine, model, dtype, threads and input shapes.
Nothing here changes a result: only what is planned and predicted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.system import regular
from blockstream.system.cache import cache_folder, write_cached
from blockstream.system.machine import cpu_name
from blockstream.system.mounts import file_system

if TYPE_CHECKING:
    from blockstream.checkpoint.read.entries import FileStamp

SCHEMA = 1
#: A fact has a few numbers a block.
MOST_NBYTES = 16_000_000

#: What a fact depends on: plain JSON.
About = Mapping[str, Any]


def read(about: About, folder: Path | None = None) -> dict[str, float]:
    """Return the numbers kept of a fact by name; {} when there are none, or the file cannot be read."""
    try:
        found = regular.read_json(_file(about, folder), MOST_NBYTES)
        if found["schema"] != SCHEMA:
            return {}
        numbers = {str(name): float(value) for name, value in found["numbers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in numbers.items() if math.isfinite(value) and value >= 0}


def write(about: About, numbers: Mapping[str, float], folder: Path | None = None) -> None:
    """Keep numbers of a fact, over what was kept of the same names; all or nothing.

    A cache that refuses is done without.
    """
    if not numbers:
        return
    merged = {**read(about, folder), **numbers}
    value = {"schema": SCHEMA, "about": dict(about), "when": time.time(), "numbers": merged}
    write_cached(_file(about, folder), value)


def load_costs_of(files: Iterable[FileStamp], dtype: str | None) -> About:
    """Return what load times depend on: machine, disk, the checkpoint's contents, the dtype asked for."""
    stamps = sorted(files, key=lambda f: str(f.path))
    where = disk_of(stamps[0]) if stamps else ""
    return {"fact": "load_s", "machine": machine(), "disk": where, **_checkpoint(stamps), "dtype": dtype}


def execute_costs_of(
    files: Iterable[FileStamp], dtype: str | None, threads: int, shapes: str | None
) -> About:
    """Return what execution times depend on; `shapes` says what the inputs look like."""
    stamps = sorted(files, key=lambda f: str(f.path))
    return {
        "fact": "execute_s",
        "machine": machine(),
        **_checkpoint(stamps),
        "dtype": dtype,
        "threads": threads,
        "shapes": shapes,
    }


def compute_speed_of(threads: int, dtype: str) -> About:
    """Return what the operations a second depend on, whatever the model: {"flops_per_s": ...}."""
    return {"fact": "flops_per_s", "machine": machine(), "threads": threads, "dtype": dtype}


def disk_speed_of(path: Path | str) -> About:
    """Return what a disk's own speed depends on: {"bytes_per_s": ...}, as `probe.disk` measures it."""
    return {"fact": "bytes_per_s", "machine": machine(), "disk": file_system(path).source}


def read_speed_of(disk: str) -> About:
    """Return what the speed of loads depends on, whatever the checkpoint: {"bytes_per_s": ...}."""
    return {"fact": "loaded_bytes_per_s", "machine": machine(), "disk": disk}


def disk_of(file: FileStamp) -> str:
    """Return a name of what a file is read from: its disk, or the first part of its name elsewhere."""
    return file_system(file.path).source if file.source is None else f"not on a disk: {file.path.parts[0]}"


@lru_cache(maxsize=1)
def machine() -> str:
    """Return a name of the processor that two runs on one machine agree on."""
    return f"{cpu_name()} x {os.cpu_count()}"


def _checkpoint(stamps: Iterable[FileStamp]) -> dict[str, Any]:
    # What is in the files, not where they lie or when they were written: a copy costs the same.
    return {"files": [[f.header_hash, f.nbytes] for f in stamps]}


def _file(about: About, folder: Path | None) -> Path:
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return (folder or cache_folder()) / "calibration" / f"{key}.json"
