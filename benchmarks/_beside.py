"""What may happen beside a run: another process that takes memory and returns it, load, a limit that moves.

python -m benchmarks._beside NBYTES [--take-s 6] [--hold-s 4] [--pause-s 4]     # takes, holds, returns
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.cgroup import Limited

STEP_NBYTES = 16 << 20
#: A limit is never moved to less than this above what is used.
SPARE_NBYTES = 192 << 20


def taking(nbytes: int, *, take_s: float = 6, hold_s: float = 4, pause_s: float = 4) -> Sequence[str]:
    """Return the command of a process that takes `nbytes` in `take_s` seconds, returns them, and again."""
    options = ("--take-s", str(take_s), "--hold-s", str(hold_s), "--pause-s", str(pause_s))
    return [sys.executable, "-m", "benchmarks._beside", str(nbytes), *options]


@contextmanager
def moving_limit(
    group: Limited, low: int, high: int, every_s: float, spare_nbytes: int = SPARE_NBYTES, seed: int = 0
) -> Iterator[list[int]]:
    """Have a group's limit fall in steps to `low`, stay, rise to `high`, stay; yield the limits so far.

    A step leaves `spare_nbytes` above what is used then.
    """
    limits: list[int] = []
    stop = threading.Event()
    draws = random.Random(seed)

    def move() -> None:
        while not stop.is_set():
            for _ in range(draws.randint(6, 12)):  # down, and there for a while
                limit = min(high, max(low, group.usage_nbytes + spare_nbytes))
                with contextlib.suppress(OSError):  # what was free a moment ago is used now
                    group.set_memory(limit)
                    limits.append(limit)
                if stop.wait(every_s):
                    return
            group.set_memory(high)
            limits.append(high)
            if stop.wait(draws.randint(4, 8) * every_s):
                return

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield limits
    finally:
        stop.set()
        mover.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nbytes", type=int)
    parser.add_argument("--take-s", type=float, default=6)
    parser.add_argument("--hold-s", type=float, default=4)
    parser.add_argument("--pause-s", type=float, default=4)
    options = parser.parse_args()
    steps = range(0, options.nbytes, STEP_NBYTES)
    while True:
        time.sleep(options.pause_s)
        taken = mmap.mmap(-1, options.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in steps:
            taken[at : at + STEP_NBYTES] = b"\1" * min(STEP_NBYTES, options.nbytes - at)
            time.sleep(options.take_s / len(steps))
        time.sleep(options.hold_s)
        taken.close()


if __name__ == "__main__":
    main()
