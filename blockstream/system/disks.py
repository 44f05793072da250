"""What the disk under some files does, and how it is read best: measured once a disk, kept for later runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from blockstream.checkpoint.read.reader import BLOCK, REQUEST_NBYTES, THREADS
from blockstream.errors import ConfigError
from blockstream.system.probe import disk

from . import calibration

#: A disk is measured once, in about so many seconds, when a run wants its own speed compared.
PROBE_S = 1.2
_ROUNDS = 3
_MOST_THREADS = 64


class Requests(NamedTuple):
    """How a disk is read: so many requests in flight, of so many bytes."""

    threads: int = THREADS
    request_nbytes: int = REQUEST_NBYTES


def disk_speed(files: Sequence[Path]) -> float | None:
    """Return the bytes a second of the disk the largest of some files is on, None if unmeasured."""
    file = _largest(files)
    if file is None:
        return None
    about = calibration.disk_speed_of(file)
    kept = calibration.read(about).get("bytes_per_s")
    if kept:
        return kept
    with contextlib.suppress(ConfigError, OSError):  # too small a file, a system without preadv
        measured = disk(file, limit_s=PROBE_S, rounds=_ROUNDS)
        numbers = {"bytes_per_s": measured.bytes_per_s}
        usual = Requests()
        better = measured.better_than(usual.request_nbytes, usual.threads)
        if better is not None:
            numbers |= {"threads": better.depth, "request_nbytes": better.request_nbytes}
        calibration.write(about, numbers)
        return measured.bytes_per_s
    return None


def requests(files: Iterable[Path]) -> Requests:
    """Return how the disk of the largest of some files is read: as usual until another way measured faster.

    What is read is the same either way.
    """
    file = _largest(files)
    kept = calibration.read(calibration.disk_speed_of(file)) if file is not None else {}
    threads, nbytes = int(kept.get("threads", THREADS)), int(kept.get("request_nbytes", REQUEST_NBYTES))
    return Requests(min(max(threads, 1), _MOST_THREADS), max(nbytes, BLOCK))


def _largest(files: Iterable[Path]) -> Path | None:
    return max((f for f in files if f.is_file()), key=lambda f: (f.stat().st_size, f), default=None)
