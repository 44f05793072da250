"""Race blockstream against what users have today: one encoder, one budget, a control group that enforces it.

    python -m benchmarks.streaming --weights DIR            # 10 GB in DIR, about 20 minutes
    python -m benchmarks.streaming --weights DIR --small    # tried out in a minute, nothing is written

Each round runs every way once, in a process of its own, in a control group limited to the budget, with
nothing of the weights in the page cache; then the compute alone (all weights in memory, no limit), and an
independent probe of the disk (direct reads, request sizes and depths in turn). The bound of a pass is the
larger of its compute alone and the bytes it streams at the disk's speed: that of the size and depth whose
median is best, and once more that of the best single probe. Reads are not throttled.
One run of blockstream, from the files and from a pack of them, that is not counted comes first: what it
measures is kept, and planned with, as it is between the runs of any model on a machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import t5_xxl
from benchmarks._results import load, summary, table, write
from benchmarks.bench_reader import raw_s
from benchmarks.contestant import WAYS
from blockstream.budget.amounts import format_nbytes, parse_nbytes
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent
from tests.support.cgroup import limited

BUDGET = "3.3GiB"
PASSES = 4
REQUESTS = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
DEPTHS = (1, 2, 4)
PROBE_NBYTES = 1 << 30
#: From the files that users have, and from a pack of them, where nothing needs to move into place.
OURS = ("blockstream", "blockstream-packed")
#: What the project promises: the part of the bound, and the factors over the rivals.
GOALS = {"bound": 0.88, "accelerate": 2.0, "mmap": 1.6}


def drop_cached(folder: Path) -> None:
    """Drop the weights from the page cache."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(way: str, folder: Path, *, limit: int | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run a contestant cold and return its facts; `limit` is what its control group may hold."""
    drop_cached(folder)
    command = [sys.executable, "-m", "benchmarks.contestant", way, str(folder), *arguments]
    if limit is None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    else:
        with limited(memory_nbytes=limit) as group:
            done = group.run(command, timeout=1800)
    if done.returncode != 0:
        return {"way": way, "failed": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def raw_speeds(folder: Path, room: memoryview) -> dict[str, float]:
    """Return the disk's bytes a second, cold, by request size and depth.

    They read different parts of the files in turn: what was read just before may be at hand below us.
    """
    windows = itertools.cycle(
        (path, begin)
        for path in t5_xxl.files(folder)
        for begin in range(0, path.stat().st_size - len(room) + 1, len(room))
    )
    found = {}
    for request, depth in itertools.product(REQUESTS, DEPTHS):
        drop_cached(folder)
        path, begin = next(windows)
        seconds = raw_s(path, room, request, depth, begin)
        found[f"{depth} x {request >> 20} MiB"] = len(room) / seconds
    return found


def best_way(probes: Sequence[Mapping[str, float]]) -> tuple[str, float]:
    """Return the request size and depth of the highest median, and that, in bytes a second."""
    medians = {way: statistics.median(p[way] for p in probes) for way in probes[0]}
    return max(medians.items(), key=lambda item: item[1])


def race(folder: Path, rounds: int, passes: int, budget: str, ways: Sequence[str]) -> dict[str, Any]:
    """Run all ways `rounds` times in turn; return every trial."""
    room_nbytes = min(PROBE_NBYTES, max(p.stat().st_size for p in t5_xxl.files(folder)) // 4096 * 4096)
    arena = Arena(room_nbytes)
    arena.populate(Extent(0, room_nbytes))
    room = arena.view(Extent(0, room_nbytes))
    arguments = ["--budget", budget, "--passes", str(passes)]
    trials: dict[str, list[dict[str, Any]]] = {way: [] for way in (*ways, "resident")}
    raw: list[dict[str, float]] = []
    first = {}
    for way in (w for w in OURS if w in ways):
        first[way] = run(way, folder, limit=parse_nbytes(budget), arguments=arguments)
        print(f"before: {way}: {_line(first[way])}", flush=True)
    for n in range(rounds):
        turn = ways[n % len(ways) :] + ways[: n % len(ways)]
        for way in turn:
            raw.append(raw_speeds(folder, room))
            facts = run(way, folder, limit=parse_nbytes(budget), arguments=arguments)
            trials[way].append(facts)
            print(
                f"round {n + 1} {way}: {_line(facts)}; raw {max(raw[-1].values()) / 1e9:.2f} GB/s", flush=True
            )
        facts = run("resident", folder, limit=None, arguments=arguments)
        trials["resident"].append(facts)
        print(f"round {n + 1} resident: {_line(facts)}", flush=True)
    return {
        "uncounted": first,
        "trials": trials,
        "raw_bytes_per_s": raw,
    }


def _line(facts: dict[str, Any]) -> str:
    if "failed" in facts:
        return str(facts["failed"])
    each = " ".join(f"{s:.2f}" for s in facts["passes_s"])
    return f"{sum(facts['passes_s']):.2f} s ({each}), loading {facts['load_s']:.2f} s"


def judge(found: dict[str, Any], passes: int) -> dict[str, Any]:
    """Return times, ratios and bounds from the trials."""
    trials = {way: [t for t in ts if "failed" not in t] for way, ts in found["trials"].items()}
    times = {way: summary([sum(t["passes_s"]) for t in ts]) for way, ts in trials.items() if ts}
    with_load = {w: summary([t["load_s"] + sum(t["passes_s"]) for t in ts]) for w, ts in trials.items() if ts}
    probes = found["raw_bytes_per_s"]
    way, raw = best_way(probes)
    # The first pass with weights in memory warms the libraries up; the others are what compute takes.
    compute_s = statistics.median(s for t in trials["resident"] for s in t["passes_s"][1:])
    rounds = len(found["trials"]["resident"])
    per_round = len(probes) // rounds
    by_round = [probes[n * per_round : (n + 1) * per_round] for n in range(rounds)]
    speeds = {
        "the best way": [best_way(of)[1] for of in by_round],
        "the best probe": [max(max(p.values()) for p in of) for of in by_round],
    }
    reached = {
        way: {name: summary(_of_the_bound(found["trials"][way], compute_s, s)) for name, s in speeds.items()}
        for way in times
        if way in OURS
    }
    mine = times["blockstream"]["median"]
    faster = {w: times[w]["median"] / mine for w in times if w not in (*OURS, "resident")}
    digests = {t["digest"] for ts in trials.values() for t in ts}
    return {
        "times_s": times,
        "times_with_loading_s": with_load,
        "raw_best_bytes_per_s": raw,
        "raw_best_way": way,
        "compute_s": compute_s,
        "of_the_bound": reached,
        "times_faster_than": faster,
        "same_bits": len(digests) == 1,
        "goals": GOALS,
        "passes": passes,
    }


def _of_the_bound(trials: Sequence[dict[str, Any]], compute_s: float, speeds: Sequence[float]) -> list[float]:
    """Return for each trial the part of the bound that it reached, the disk's speed being its round's."""
    return [
        sum(max(compute_s, nbytes / speed) for nbytes in t["read_nbytes"]) / sum(t["passes_s"])
        for t, speed in zip(trials, speeds, strict=True)
        if "failed" not in t
    ]


def page(verdict: dict[str, Any], found: dict[str, Any], budget: str, folder: Path) -> str:
    """Return the result for people."""
    rows = [
        (
            way,
            time["median"],
            f"{time['range'][0]:.2f} to {time['range'][1]:.2f}",
            " ".join(f"{x:.2f}" for x in time["trials"]),
            verdict["times_with_loading_s"][way]["median"],
            f"{verdict['times_faster_than'][way]:.2f}x" if way in verdict["times_faster_than"] else "",
        )
        for way, time in verdict["times_s"].items()
    ]
    reached = [
        (way, *(x for name in of for x in (f"{of[name]['median']:.3f}", _span(of[name]["range"]))))
        for way, of in verdict["of_the_bound"].items()
    ]
    failed = [f"{way}: {t['failed']}" for way, ts in found["trials"].items() for t in ts if "failed" in t]
    probes = found["raw_bytes_per_s"]
    raw = [speed for probe in probes for speed in probe.values()]
    nbytes = sum(p.stat().st_size for p in t5_xxl.files(folder))
    lines = [
        f"{format_nbytes(nbytes)} of weights, {t5_xxl.TOKENS} tokens, {verdict['passes']} passes, cold, "
        f"budget and control group {budget}. Seconds for all passes:",
        "",
        table(("way", "median s", "range", "trials", "with loading s", "blockstream is faster by"), rows),
        "",
        f"Of the bound (the goal is {GOALS['bound']}), where the disk's speed is that of the probes of the "
        "same round: the best way to read by its median, and the best single probe of all ways:",
        "",
        table(("way", "by the best way", "range", "by the best probe", "range"), reached),
        "",
        f"Compute alone is {verdict['compute_s']:.2f} s a pass. The best way to read was "
        f"{verdict['raw_best_way']}, {verdict['raw_best_bytes_per_s'] / 1e9:.2f} GB/s in the median of "
        f"{len(probes)} probes; all ways, all probes: {min(raw) / 1e9:.2f} to {max(raw) / 1e9:.2f}.",
        "",
        *(line for way in verdict["of_the_bound"] for line in (_plan(way, found["trials"][way]), "")),
        f"All ways gave {'the same bits' if verdict['same_bits'] else 'DIFFERENT BITS'}. The weights are "
        "synthetic: random numbers in the layout of a checkpoint. Loading is what comes before the first "
        "forward, imports apart: blockstream plans and commits its memory and reads no weight, the others "
        "map or read what they keep.",
        "",
        load(),
        *(["", "Failed:", *failed] if failed else []),
    ]
    return "\n".join(lines)


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _plan(way: str, trials: Sequence[dict[str, Any]]) -> str:
    """Return in a sentence how a way of ours was planned, and whether it held."""
    mine = [t for t in trials if "failed" not in t]
    last = mine[-1]
    return (
        f"The plan of {way}: {last['policy']}, {last['stage']['d']} of {last['stage']['b']} blocks retained, "
        f"{last['slots']} slots; read {', '.join(format_nbytes(n) for n in last['read_nbytes'])} in the "
        f"passes ({last['read']}). Peak {format_nbytes(last['budget']['peak_nbytes'])} of "
        f"{format_nbytes(last['budget']['nbytes'])}, "
        f"{'held' if all(t['budget']['held'] for t in mine) else 'BROKEN'} in every round."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of the weights, written if need be"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[w for w in WAYS if w != "resident"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    folder = t5_xxl.checkpoint(options.weights, "small" if options.small else "full")
    t5_xxl.packed(folder)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BLOCKSTREAM_CACHE"] = cache
        found = race(folder, options.rounds, options.passes, options.budget, options.ways)
    verdict = judge(found, options.passes)
    text = page(verdict, found, options.budget, folder)
    if options.small:
        print(text)
        return
    command = (
        f"python -m benchmarks.streaming --weights DIR --rounds {options.rounds} --passes {options.passes}"
    )
    title = "A 4.9 GB encoder in 3.3 GiB: blockstream, accelerate's offload, mapped safetensors"
    write("streaming", command, title, text, {**verdict, **found})


if __name__ == "__main__":
    main()
