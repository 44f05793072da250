"""What was measured here before: seconds a load and a visit took, for the next plan to start from.

One small JSON file a fact in the cache folder, named by a hash of what the fact depends on. Loads
depend on machine, disk and checkpoint; execution on machine, torch, model, dtype, threads and input shapes;
operations on machine, torch, threads, dtype and shapes. A measurement has its time and what else ran then.
Nothing here changes a result: only what is planned and predicted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.system import regular
from blockstream.system.cache import cache_folder, write_cached
from blockstream.system.machine import cpu_name, version
from blockstream.system.mounts import file_system

if TYPE_CHECKING:
    from blockstream.checkpoint.read.entries import FileStamp

SCHEMA = 2
#: A fact has a few numbers a block.
MOST_NBYTES = 16_000_000
#: Measurements of a fact that are kept, the newest, and the days that one is believed.
MOST_KEPT, BELIEVED_DAYS = 5, 90
#: Two measurements are of one state of the machine when the parts of it that other work took differ by less.
ALIKE = 0.15
#: Two that were made in like states and differ by more than this are not both true.
DISAGREE = 1.5

#: What a fact depends on: plain JSON.
About = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Numbers by name, measured at one time; `load`: the part of the processors that other work took then."""

    numbers: Mapping[str, float]
    when: float = 0.0
    load: float = 0.0


def read(about: About, folder: Path | None = None) -> dict[str, float]:
    """Return the numbers kept of a fact by name, the newest of each; {} when there are none."""
    found: dict[str, float] = {}
    for one in measurements(about, folder):
        found |= one.numbers
    return found


def believed(about: About, load: float, folder: Path | None = None) -> Measured | None:
    """Return what to believe of a fact while other work takes `load` of the processors; None: nothing.

    Of several measurements it is the newest of those made in the state most like this one. Where those of
    like states differ by more than half, it is the one in the middle.
    """
    found = measurements(about, folder)
    if not found:
        return None
    nearest = min(abs(one.load - load) for one in found)
    alike = [one for one in found if abs(one.load - load) <= nearest + ALIKE / 2]
    totals = sorted(alike, key=lambda one: sum(one.numbers.values()))
    least, most = (sum(one.numbers.values()) for one in (totals[0], totals[-1]))
    return totals[(len(totals) - 1) // 2] if most > DISAGREE * least else alike[-1]


def measurements(about: About, folder: Path | None = None) -> list[Measured]:
    """Return the measurements kept of a fact, oldest first, but for those that are too old."""
    try:
        found = regular.read_json(_file(about, folder), MOST_NBYTES)
        if found["schema"] != SCHEMA:
            return []
        kept = [_measured(one) for one in found["measured"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    oldest = time.time() - 86400 * BELIEVED_DAYS
    return [one for one in kept if one.numbers and one.when >= oldest]


def _measured(one: Mapping[str, Any]) -> Measured:
    numbers = {str(name): float(value) for name, value in one["numbers"].items()}
    true = {name: value for name, value in numbers.items() if math.isfinite(value) and value >= 0}
    return Measured(true, float(one["when"]), min(max(float(one["load"]), 0.0), 1.0))


def write(about: About, numbers: Mapping[str, float], folder: Path | None = None, load: float = 0.0) -> None:
    """Keep numbers of a fact as measured now, over what the last measurement has of the same names.

    `load` is the part of the processors that other work took. A cache that refuses is done without.
    """
    if not numbers:
        return
    before = measurements(about, folder)
    last = dict(before[-1].numbers) if before else {}
    kept = [*before[1 - MOST_KEPT :], Measured({**last, **numbers}, time.time(), load)]
    value = {"schema": SCHEMA, "about": dict(about), "measured": [asdict(one) for one in kept]}
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
        "torch": version("torch"),
    }


def operation_of(spec: str, threads: int) -> About:
    """Return what the seconds of one operation depend on, whatever the model: {"s": ...}."""
    return {
        "fact": "operation_s",
        "machine": machine(),
        "threads": threads,
        "torch": version("torch"),
        "operation": spec,
    }


def around_of(pipeline: str, threads: int) -> About:
    """Return what the seconds around a run's stages depend on: {"start": ..., "rest": ...}."""
    return {"fact": "around_s", "machine": machine(), "pipeline": pipeline, "threads": threads}


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
