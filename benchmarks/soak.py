"""Soak the engine: 200 passes beside random load under a limit that moves, and 50 sessions in one process.

    python -m benchmarks.soak [--passes 200] [--cycles 50]     # some 600 MB of weights, a few minutes

The passes run with `budget: auto` in a control group, without swap, where a second process takes and returns
memory and a third computes in bursts, and whose limit falls and rises all the while. What the process holds
besides weights must stay flat, all outputs equal, and nobody wait for ever. Then sessions are opened, run and
closed 50 times in one process: no thread, descriptor or map may be left, nor memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks import t5_xxl
from benchmarks._beside import moving_limit, taking
from benchmarks._results import load, table, write
from blockstream.budget.amounts import format_nbytes
from blockstream.system.memory import held, trim_heap
from tests.support.cgroup import limited

MIB = 1 << 20
#: The group's limit moves between these.
LOW_NBYTES, HIGH_NBYTES = 700 * MIB, 1500 * MIB
TAKEN_NBYTES = 300 * MIB
#: What is held besides weights may grow by so much from the first quarter of the passes to the last.
FLAT_NBYTES = 8 * MIB
#: Computes in bursts of random length.
BURSTS = """
import random, time
draws = random.Random(1)
while True:
    until = time.monotonic() + draws.uniform(0.05, 1.0)
    while time.monotonic() < until:
        sum(range(1000))
    time.sleep(draws.uniform(0.05, 1.0))
"""


def soak(folder: Path, passes: int) -> dict[str, Any]:
    """Return the facts of many passes beside load, memory taken and returned, and a limit that moves."""
    command = [sys.executable, "-m", "benchmarks.contestant", "blockstream", str(folder)]
    with limited(memory_nbytes=HIGH_NBYTES) as group:
        group.popen(taking(TAKEN_NBYTES, take_s=2, hold_s=2, pause_s=2))
        group.popen([sys.executable, "-c", BURSTS])
        with moving_limit(group, LOW_NBYTES, HIGH_NBYTES, every_s=0.25) as limits:
            done = group.run([*command, "--budget", "auto", "--passes", str(passes)], timeout=3600)
        if done.returncode != 0:
            raise SystemExit(f"exit {done.returncode}: {done.stderr.strip()[-2000:]}")
        facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    beside, quarter = facts["beside_nbytes"], max(1, passes // 4)
    # The first passes warm libraries up.
    first, last = (statistics.median(x) for x in (beside[2 : 2 + quarter], beside[-quarter:]))
    return {**facts, "moves": len(limits), "limits": [min(limits), max(limits)], "grown_nbytes": last - first}


def state() -> dict[str, Any]:
    """Return the threads, descriptors and maps of this process."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def cycles(folder: Path, count: int) -> dict[str, Any]:
    """Open, run and close sessions in this process; return what there is after the first and the last."""
    import torch

    import blockstream

    block = t5_xxl.block_nbytes(folder)
    ids = t5_xxl.tokens(16)

    def once(n: int) -> None:
        with torch.inference_mode(), blockstream.open(arena=(3 + n % 22) * (block + MIB)) as s:
            module = s.stage("t5", lambda: t5_xxl.build(folder), folder, passes=2)
            for _ in range(n % 3):
                module(ids)

    for n in (2, 22):
        once(n)
    trim_heap()
    before, nbytes = state(), held().nbytes
    for n in range(count):
        once(n)
    trim_heap()
    return {"before": before, "after": state(), "grown_nbytes": held().nbytes - nbytes}


def page(found: dict[str, Any], passes: int, count: int) -> str:
    run, left = found["soak"], found["cycles"]
    before, after = left["before"], left["after"]
    plans = [p[1] for p in run["plans"]]
    flat = run["grown_nbytes"] <= FLAT_NBYTES
    rows = [(name, before[name], after[name]) for name in before]
    grown = left["grown_nbytes"] / MIB
    return "\n".join(
        [
            f"{passes} passes in {sum(run['passes_s']):.0f} s, the limit moved {run['moves']} times between "
            f"{format_nbytes(run['limits'][0])} and {format_nbytes(run['limits'][1])}, "
            f"{format_nbytes(TAKEN_NBYTES)} "
            f"taken and returned by a second process: {len(plans)} plans of {format_nbytes(min(plans))} to "
            f"{format_nbytes(max(plans))} of weights. Not killed, no pass waited for ever (the longest took "
            f"{max(run['passes_s']):.2f} s, the median {statistics.median(run['passes_s']):.2f} s), all "
            f"outputs equal. The budget was {'held' if run['budget']['held'] else 'NOT HELD'}.",
            "",
            f"What was held besides weights, medians of the first and last quarter of the passes: "
            f"{run['grown_nbytes'] / MIB:+.1f} MiB, {'flat' if flat else 'NOT FLAT'}.",
            "",
            f"After {count} sessions in one process (memory {grown:+.1f} MiB):",
            "",
            table(("", "before", "after"), rows),
            "",
            load(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(cycles(options.child, options.cycles)))
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "build" if Path("build").is_dir() else None) as made:
        folder = t5_xxl.checkpoint(Path(made) / "narrow", "narrow")
        found = {"soak": soak(folder, options.passes)}
        again = [
            sys.executable,
            "-m",
            "benchmarks.soak",
            "--child",
            str(folder),
            "--cycles",
            str(options.cycles),
        ]
        done = subprocess.run(again, capture_output=True, text=True, check=True)
        found["cycles"] = json.loads(done.stdout.strip().splitlines()[-1])
    command = f"python -m benchmarks.soak --passes {options.passes} --cycles {options.cycles}"
    write("soak", command, "Many passes, many sessions", page(found, options.passes, options.cycles), found)


if __name__ == "__main__":
    main()
