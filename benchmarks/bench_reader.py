"""Measure the reader beside the raw device, in one run, over request sizes and requests in flight.

    python -m benchmarks.bench_reader FILE [--rounds 5] [--mib 1024]

FILE is any large file on the disk in question; an old one tells more than one just written. Each round
reads the same bytes every way in turn: raw is a bare loop of aligned preadv calls with O_DIRECT, one
thread each; the reader is `blockstream.checkpoint.read.reader.Reader`.
Writes a dated result with every trial.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from itertools import count
from pathlib import Path
from statistics import median

from benchmarks._results import summary, table, write
from blockstream.checkpoint.read.reader import BLOCK, Reader, Wanted
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent

REQUESTS = (1 << 20, 4 << 20, 8 << 20, 16 << 20, 64 << 20)
DEPTHS = (1, 2, 4)


def raw_s(path: Path, room: memoryview, request: int, depth: int, begin_at: int = 0) -> float:
    """Return the seconds a bare loop takes to fill the room from a file, from `begin_at` on."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    turn = count()

    def work() -> None:
        while (at := next(turn) * request) < len(room):
            while at < len(room) and (n := os.preadv(descriptor, [room[at : at + request]], begin_at + at)):
                at += n
                if at % request == 0:
                    break

    threads = [threading.Thread(target=work) for _ in range(depth)]
    begin = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    os.close(descriptor)
    return time.perf_counter() - begin


def reader_s(path: Path, room: memoryview, request: int, depth: int) -> tuple[float, str]:
    """Return the seconds the reader takes for the same bytes, and its mode."""
    with Reader(threads=depth, request_nbytes=request) as reader:
        file = reader.open(path)
        begin = time.perf_counter()
        reader.read([Wanted(file, 0, len(room), room)])
        return time.perf_counter() - begin, reader.mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="most MiB of the file to read")
    options = parser.parse_args()
    nbytes = min(options.file.stat().st_size, options.mib << 20) // BLOCK * BLOCK
    arena = Arena(nbytes)
    arena.populate(Extent(0, nbytes))  # warm-up: page faults are not the disk's
    room = arena.view(Extent(0, nbytes))
    ways = [(r, d) for r in REQUESTS for d in DEPTHS]
    found: dict[tuple[int, int], tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
    mode = ""
    for _ in range(options.rounds):
        for way in ways:
            raw, ours = found[way]
            raw.append(nbytes / raw_s(options.file, room, *way) / 1e9)
            seconds, mode = reader_s(options.file, room, *way)
            ours.append(nbytes / seconds / 1e9)
    best_raw, best_ours = (max(median(pair[i]) for pair in found.values()) for i in (0, 1))
    rows = [
        (f"{request >> 20} MiB x {depth}", shown(raw), shown(ours))
        for (request, depth), (raw, ours) in found.items()
    ]
    page = (
        f"{nbytes / 1e9:.2f} GB of one file, {options.rounds} rounds, reads {mode}; GB/s, median and range."
        "\n\n" + table(("request x in flight", "raw device", "reader"), rows) + "\n\nBest of each: "
        f"raw {best_raw:.2f}, reader {best_ours:.2f} GB/s, {best_ours / best_raw:.0%}."
    )
    data = {
        "nbytes": nbytes,
        "mode": mode,
        "gb_per_s": [
            {"request_nbytes": r, "in_flight": d, "raw": summary(raw), "reader": summary(ours)}
            for (r, d), (raw, ours) in found.items()
        ],
    }
    write("reader", "python -m benchmarks.bench_reader FILE", "The reader beside the raw device", page, data)


def shown(trials: list[float]) -> str:
    return f"{median(trials):.2f} ({min(trials):.2f} to {max(trials):.2f})"


if __name__ == "__main__":
    main()
