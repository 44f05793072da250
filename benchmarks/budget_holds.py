"""Show that the budget holds: a 4.6 GB encoder under limits that the kernel enforces by killing.

    python -m benchmarks.budget_holds --weights DIR            # 4.9 GB in DIR, about five minutes
    python -m benchmarks.budget_holds --weights DIR --small    # tried out in a minute, nothing is written

Under each limit the encoder runs twice in a control group without swap: by itself, budget and limit the
same; and with `budget: auto` while a second process in the same group takes 1 GiB and returns it, again and
again, and the group's limit falls from 2 GiB to 1 GiB above the one named and rises, never below what is
used: at the tightest the limit named is left to the encoder. Shown are the passes, the peak (anonymous,
shared and swapped memory of the process, sampled every 10 ms) against the budget, what the kernel counted for
the group, and whether all outputs are those of the resident module, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import t5_xxl
from benchmarks._beside import moving_limit, taking
from benchmarks._results import load, table, write
from benchmarks.streaming import drop_cached, run
from blockstream.budget.amounts import format_nbytes, parse_nbytes
from tests.support.cgroup import Limited, limited

LIMITS = ("1.3GiB", "1.5GiB", "3.3GiB")
SMALL_LIMITS = ("420MiB",)
TAKEN = 1 << 30
SMALL_TAKEN = 64 << 20
PASSES = 4
SECONDS = 45.0


def alone(folder: Path, limit: str) -> dict[str, Any]:
    """Run some passes with the budget equal to the group's limit."""
    with limited(memory_nbytes=parse_nbytes(limit)) as group:
        return _in(group, folder, ("--budget", limit, "--passes", str(PASSES)))


def disturbed(folder: Path, limit: str, taken: int, seconds: float) -> dict[str, Any]:
    """Run for some time while memory is taken and returned and the limit moves."""
    low, high = parse_nbytes(limit) + taken, parse_nbytes(limit) + 2 * taken
    with limited(memory_nbytes=high) as group:
        group.popen(taking(taken))
        with moving_limit(group, low, high, every_s=0.5) as limits:
            arguments = ("--budget", "auto", "--seconds", str(seconds))
            facts = _in(group, folder, arguments, seconds + 300)
        return {**facts, "limits": [min(limits), max(limits)], "moves": len(limits)}


def _in(group: Limited, folder: Path, arguments: tuple[str, ...], timeout: float = 300) -> dict[str, Any]:
    drop_cached(folder)
    command = [sys.executable, "-m", "benchmarks.contestant", "blockstream", str(folder), *arguments]
    done = group.run(command, timeout=timeout)
    if done.returncode != 0:
        return {"failed": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**facts, "group_peak_nbytes": group.peak_nbytes}


def row(name: str, facts: dict[str, Any], digest: str) -> list[str]:
    if "failed" in facts:
        return [name, facts["failed"].splitlines()[0], *[""] * 6]
    budget = facts["budget"]
    arenas = [p[1] for p in facts["plans"]]
    return [
        name,
        str(len(facts["passes_s"])),
        format_nbytes(budget["peak_nbytes"]),
        format_nbytes(budget["nbytes"]),
        "yes" if budget["held"] else "NO",
        format_nbytes(facts["group_peak_nbytes"]),
        f"{format_nbytes(min(arenas))} to {format_nbytes(max(arenas))} ({len(arenas)} plans)",
        "yes" if facts["digest"] == digest else "NO",
    ]


KEPT = "Never killed, always held, every pass bit for bit that of the resident module."
HEAD = ("", "passes", "peak", "budget at the end", "held", "group's peak", "weights held", "same bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights, made if need be")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long each disturbed run goes on")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    folder = t5_xxl.checkpoint(options.weights, "small" if options.small else "full")
    taken = SMALL_TAKEN if options.small else TAKEN
    digest = run("resident", folder, limit=None, arguments=("--passes", "2"))["digest"]
    found: dict[str, dict[str, Any]] = {}
    for limit in SMALL_LIMITS if options.small else LIMITS:
        found[f"{limit}, alone"] = alone(folder, limit)
        found[f"{limit}, disturbed"] = disturbed(folder, limit, taken, options.seconds)
        for name in list(found)[-2:]:
            print(" | ".join(row(name, found[name], digest)), flush=True)
    kept = all("failed" not in f and f["budget"]["held"] and f["digest"] == digest for f in found.values())
    text = "\n".join(
        [
            f"{format_nbytes(sum(p.stat().st_size for p in t5_xxl.files(folder)))} of weights, "
            f"{t5_xxl.TOKENS} tokens. Disturbed: the group has {format_nbytes(taken)} to twice as much "
            f"more, as its limit moves, and a second process takes and returns {format_nbytes(taken)}, for "
            f"{options.seconds:.0f} s.",
            "",
            table(HEAD, [row(name, facts, digest) for name, facts in found.items()]),
            "",
            f"{KEPT if kept else 'NOT ALL HELD.'} "
            f"The group's peak counts page cache and the second process too. {load()}",
        ]
    )
    if options.small:
        print(text)
        return
    command = f"python -m benchmarks.budget_holds --weights DIR --seconds {options.seconds:g}"
    write(
        "budget-holds", command, "The budget under limits that kill", text, {"digest": digest, "runs": found}
    )


if __name__ == "__main__":
    main()
