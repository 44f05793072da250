"""Soak the whole pipeline at its full size: 200 passes at 256 tokens, beside load, under a limit that moves.

    python -m benchmarks.soak_pipeline --weights DIR     # DIR as for benchmarks.full_size; half an hour
    python -m benchmarks.soak_pipeline --small           # tried out with the embedded model

phone.yaml makes one image of 256 x 256 pixels (256 tokens, guided) in many steps, twice, STDiT3 in bfloat16
(converted from its float32 files as they are read: a pass takes half as long). First alone, with a large
budget; then with `budget: auto` in a control group, without swap, where a second process takes and returns
memory and a third computes in bursts, and whose limit falls and rises all the while. What is held besides
weights must stay flat while STDiT3 runs, the budget held, and both images the same bytes.
Writes results/DATE-soak-pipeline.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._beside import moving_limit, taking
from benchmarks._results import load, write
from benchmarks.full_size import command, sets, weights
from benchmarks.soak import BURSTS, FLAT_NBYTES, TAKEN_NBYTES
from blockstream.budget.amounts import format_nbytes, parse_nbytes
from blockstream.engine.ledger import read_records
from tests.support.cgroup import Limited, limited

#: The group's limit moves between these, in full and small.
LIMITS = {False: ("1.5GiB", "3.3GiB"), True: ("700MiB", "1GiB")}
ALONE = "10GiB"
EVERY_S = 1.0
#: The limit is never moved to less than this above what is used: a block may take 300 MiB while it computes.
SPARE_NBYTES = 512 << 20


def run(found: Path | None, out: Path, steps: int, disturbed: bool) -> dict[str, Any]:
    """Return the facts of one run, and of what went on beside it."""
    small = found is None
    low, high = (parse_nbytes(x) for x in LIMITS[small])
    given = {"frames": 1, "steps": steps, "budget": "auto" if disturbed else ALONE}
    if not small:
        given |= {"height": 256, "width": 256, "dit.dtype": "bf16"}
    line = command(
        "run", "movd.yaml" if small else "phone.yaml", "--out", out, *sets("phone.yaml", found, **given)
    )
    with ExitStack() as stack:
        group = stack.enter_context(limited(memory_nbytes=high if disturbed else parse_nbytes("16GiB")))
        limits: list[int] = []
        if disturbed:
            limits = stack.enter_context(_disturb(stack, group, low, high))
        done = group.run(line, timeout=2 * 3600)
    if done.returncode != 0:
        raise SystemExit(f"exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    report = json.loads((out / "report.json").read_text())
    return {
        "budget": report["budget"],
        "wall_s": report["wall_s"],
        "limits": limits,
        "files": report["output"]["files"],
        **_passes(out / "ledger.jsonl", report["stages"][1]["name"]),
    }


def _disturb(stack: ExitStack, group: Limited, low: int, high: int) -> Any:
    """Start what computes and takes memory beside the run; return what moves the limit."""
    group.popen(taking(TAKEN_NBYTES))
    group.popen([sys.executable, "-c", BURSTS])
    return moving_limit(group, low, high, every_s=EVERY_S, spare_nbytes=SPARE_NBYTES)


def _passes(ledger: Path, name: str) -> dict[str, Any]:
    """Return the seconds of each pass of a stage, and what was held then, besides weights, at most."""
    records = read_records(ledger)
    plans = [n.value for n in records.notes if n.kind == "plan"]
    spans = [s for s in records.spans if s.thread == "compute" and s.visit is not None]
    memory = [(n.at_s, *n.value) for n in records.notes if n.kind == "memory"]
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    for s in spans:
        if s.visit is not None and s.visit.stage == 1:
            begins.setdefault(s.visit.pass_index, s.start_s)
            ends[s.visit.pass_index] = s.end_s
    beside: list[int] = []
    for p in sorted(begins):
        held = [n - arena for at, n, arena in memory if begins[p] <= at <= ends[p]]
        beside += [max(held)] * bool(held)
    quarter = max(1, len(beside) // 4)
    # The first passes warm libraries up.
    first, last = (statistics.median(x) for x in (beside[2 : 2 + quarter], beside[-quarter:]))
    return {
        "stage": name,
        "pass_s": [ends[p] - begins[p] for p in sorted(begins)],
        "grown_nbytes": last - first,
        "plans": len(plans),
    }


def page(alone: dict[str, Any], beside: dict[str, Any], same: bool) -> str:
    """Return the result for people."""
    times = beside["pass_s"]
    grown = beside["grown_nbytes"]
    return "\n".join(
        [
            f"{len(times)} passes of {beside['stage']} at 256 tokens (bfloat16, both halves of guidance) in "
            f"{sum(times):.0f} s ({statistics.median(times):.2f} s in the median, {max(times):.2f} s the "
            f"longest), {beside['wall_s']:.0f} s in all; alone, with {ALONE}, {sum(alone['pass_s']):.0f} s "
            f"({statistics.median(alone['pass_s']):.2f} s in the median). The limit moved "
            f"{len(beside['limits'])} times between {format_nbytes(min(beside['limits']))} and "
            f"{format_nbytes(max(beside['limits']))}, {format_nbytes(TAKEN_NBYTES)} taken and returned by a "
            f"second process: {beside['plans']} plans. Not killed; the budget was "
            f"{'held' if beside['budget']['held'] else 'NOT HELD'}, at a peak of "
            f"{format_nbytes(beside['budget']['peak_nbytes'])}.",
            "",
            f"What was held besides weights, most of a pass, medians of the first and last quarter of the "
            f"passes: {grown / (1 << 20):+.1f} MiB, {'flat' if grown <= FLAT_NBYTES else 'NOT FLAT'}.",
            "",
            f"The image is {'the same' if same else 'NOT THE SAME'}, byte for byte, as the one made alone.",
            "",
            load(),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of the networks, filled if need be and kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(argv)
    with ExitStack() as stack:
        found = None if options.small else stack.enter_context(weights(options.weights))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = [run(found, scratch / str(n), options.steps, bool(n)) for n in range(2)]
        images = [(scratch / str(n) / r["files"][0]).read_bytes() for n, r in enumerate(runs)]
    same = images[0] == images[1]
    text = page(*runs, same)
    if options.small:
        print(text)
        return
    data = {"alone": runs[0], "beside": runs[1], "same": same}
    title = "The whole pipeline, many passes beside load"
    write("soak-pipeline", f"python -m benchmarks.soak_pipeline --steps {options.steps}", title, text, data)


if __name__ == "__main__":
    main()
