"""A rehearsal in a process of its own: what it imports, and what fake tensors take, is not taken here.

The process is a fork, so the module need not be pickled, and the memory of weights is not in it. What comes
back is JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from blockstream.system import regular
from blockstream.system.limits import headroom

from .kept_rehearsals import Rehearsal, as_json, from_json

log = logging.getLogger(__name__)

#: What the system must have free: the imports, fake tensors, and pages that both processes write to.
FREE_NBYTES = 160 << 20
#: A fork of a process with threads may wait for a lock that none of them will ever give back: it is given up
#: when it has not computed for so long.
IDLE_S = 60.0


def may_fork() -> bool:
    """Return whether this system lets a process be forked for a rehearsal, and has room for it."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    forks = sys.platform == "linux" and not used
    return forks and headroom().nbytes > FREE_NBYTES


def in_fork(run: Callable[[], Rehearsal | None]) -> Rehearsal | None:
    """Return what a rehearsal shows; None as well where the process cannot be made, or comes to no end."""
    read, write = os.pipe()
    try:
        with warnings.catch_warnings():  # of threads, which the child does not use
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError as error:
        os.close(read)
        os.close(write)
        log.info("a forward is learnt from its first pass: %s", error)
        return None
    if child == 0:
        _tell(write, run)
    os.close(write)
    try:
        told = _heard(read, child)
    finally:
        os.close(read)
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    try:
        return from_json(json.loads(told))
    except (ValueError, KeyError, TypeError, IndexError):  # it said nothing, or was ended while it did
        log.info("a forward is learnt from its first pass: it cannot be rehearsed apart")
        return None


def _tell(write: int, run: Callable[[], Rehearsal | None]) -> None:
    """Write what a rehearsal shows, and end the process whatever happens."""
    try:
        gc.freeze()  # what is collected may lie in the memory of weights, which is not here
        torch.set_num_threads(1)  # those of the pool are not in this process
        found = run()
        if found is not None:
            with os.fdopen(write, "w") as pipe:
                json.dump(as_json(found), pipe)
    finally:
        os._exit(0)


def _heard(read: int, child: int) -> bytes:
    """Return what the other process writes until it ends; nothing where it computes no more."""
    told, computed, since_s = bytearray(), -1, time.monotonic()
    while time.monotonic() - since_s < IDLE_S:
        if select.select([read], [], [], 0.5)[0]:
            piece = os.read(read, 1 << 16)
            if not piece:
                return bytes(told)
            told += piece
        if (now := _computed(child)) != computed:
            computed, since_s = now, time.monotonic()
    return b""


def _computed(process: int) -> int:
    """Return the ticks that a process has computed, waits for the disk included."""
    fields = regular.read_text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) + int(fields[39])
