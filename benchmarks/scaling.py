"""Time a pass against the size of the model and against the budget, the hardware's bound beside it.

    python -m benchmarks.scaling --weights DIR            # 18 GB in DIR, about 10 minutes
    python -m benchmarks.scaling --weights DIR --small    # tried out in a minute, nothing is written

Encoders of up to 52 blocks of 96 MB, 0.5 to 4 times a budget of 1.2 GiB; then the largest of them under
budgets from the least that is round to more than it needs. Each trial is a process of its own, cold, in a
control group limited to the budget; a pass is the median of those after the first. The bound is the larger
of compute with all weights in memory (measured apart, for each size) and the bytes a pass reads at the
disk's speed, read in the best way by the median of probes before each trial.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import t5_xxl
from benchmarks._results import load, path_of, table, write
from benchmarks.streaming import PROBE_NBYTES, best_way, raw_speeds, run
from blockstream.budget.amounts import format_nbytes, parse_nbytes
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent

BUDGET = "1.2GiB"
TIMES = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
BUDGETS = ("0.6GiB", "0.9GiB", "1.2GiB", "2GiB", "3GiB", "4GiB", "5.5GiB")
PASSES = 5
#: What --small runs in place of these.
SMALL = {"budget": "450MiB", "times": (0.5,), "budgets": ("450MiB", "600MiB")}


def trial(folder: Path, budget: str, probed: Path, room: memoryview) -> dict[str, Any]:
    """Return one run's facts, and what the disk did just before: the largest folder is probed for all."""
    speeds, arguments = raw_speeds(probed, room), ["--budget", budget, "--passes", str(PASSES)]
    return {
        "raw_bytes_per_s": speeds,
        **run("blockstream", folder, limit=parse_nbytes(budget), arguments=arguments),
    }


def row(
    trials: Sequence[dict[str, Any]], compute_s: float, blocks: int, block: int, budget: str
) -> dict[str, Any]:
    """Return a pass and its bound, medians over the trials, of one size and budget."""
    done = [t for t in trials if "failed" not in t]
    facts: dict[str, Any] = {
        "blocks": blocks,
        "weights_nbytes": blocks * block,
        "budget_nbytes": parse_nbytes(budget),
        "compute_s": compute_s,
        "failed": [t["failed"] for t in trials if "failed" in t],
        "trials": list(trials),
    }
    if not done:
        return facts
    _, best = best_way([t["raw_bytes_per_s"] for t in done])
    # With everything in memory the hooks are gone, and no pass is counted.
    reads = [[*t["read_nbytes"], *[0] * PASSES][1:PASSES] for t in done]
    read = statistics.median(statistics.median(of) for of in reads)
    facts |= {
        "pass_s": statistics.median(statistics.median(t["passes_s"][1:]) for t in done),
        "read_nbytes": read,
        "bound_s": max(compute_s, read / best),
        "retained": done[-1]["retained"],
        "policy": done[-1]["policy"],
        "held": all(t["budget"]["held"] for t in done),
    }
    return facts


def page(found: dict[str, Any]) -> str:
    def lines(rows: Sequence[dict[str, Any]]) -> str:
        cells = [
            (
                format_nbytes(r["weights_nbytes"]),
                format_nbytes(r["budget_nbytes"]),
                *(
                    (
                        f"{r['pass_s']:.2f}",
                        f"{r['bound_s']:.2f}",
                        f"{r['bound_s'] / r['pass_s']:.2f}",
                        f"{r['compute_s']:.2f}",
                        format_nbytes(round(r["read_nbytes"])),
                        f"{r['policy']}, {r['retained']}",
                        "held" if r["held"] else "BROKEN",
                    )
                    if "pass_s" in r
                    else ("; ".join(r["failed"])[:80], *("",) * 6)
                ),
            )
            for r in rows
        ]
        head = (
            "blocks",
            "budget",
            "a pass, s",
            "bound, s",
            "of it",
            "compute, s",
            "read a pass",
            "retained",
            "",
        )
        return table(head, cells)

    return "\n".join(
        [
            f"Medians of {found['rounds']} trials, {t5_xxl.TOKENS} tokens, each size and budget in turn.",
            "",
            f"## Against the model's size, in {found['budget']}",
            "",
            lines(found["sizes"]),
            "",
            "## Against the budget",
            "",
            lines(found["budgets"]),
            "",
            *([f"![A pass against size and budget]({found['figure']})", ""] if found.get("figure") else []),
            load(),
        ]
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw both curves with their bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for ax, rows, x in zip(axes, ("sizes", "budgets"), ("weights_nbytes", "budget_nbytes"), strict=True):
        shown = [r for r in found[rows] if "pass_s" in r]
        at = [r[x] / 2**30 for r in shown]
        ax.plot(at, [r["pass_s"] for r in shown], "o-", color="black", label="blockstream")
        ax.plot(at, [r["bound_s"] for r in shown], "--", color="tab:red", label="bound of disk and processor")
        ax.plot(at, [r["compute_s"] for r in shown], ":", color="tab:blue", label="compute alone")
        ax.set_ylim(0)
        ax.set_ylabel("seconds a pass")
    axes[0].axvline(parse_nbytes(found["budget"]) / 2**30, color="0.8", zorder=0)
    axes[0].set_xlabel(f"weights, GiB (budget {found['budget']})")
    axes[1].set_xlabel("budget, GiB")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of the weights, written if need be"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    size = "small" if options.small else "long"
    whole = t5_xxl.checkpoint(options.weights, size)
    most, block = json.loads((whole / "config.json").read_text())["num_layers"], t5_xxl.block_nbytes(whole)
    budget, times, budgets = (
        (SMALL["budget"], SMALL["times"], SMALL["budgets"]) if options.small else (BUDGET, TIMES, BUDGETS)
    )
    counts = [min(most, max(2, round(t * parse_nbytes(str(budget)) / block))) for t in times]
    cells = [(n, str(budget)) for n in counts] + [(counts[-1], str(b)) for b in budgets]
    folders = {n: t5_xxl.checkpoint(options.weights / f"blocks-{n}", size, n) for n in counts if n != most}
    folders[most] = whole
    nbytes = min(PROBE_NBYTES, max(p.stat().st_size for p in t5_xxl.files(whole)) // 4096 * 4096)
    arena = Arena(nbytes)
    arena.populate(Extent(0, nbytes))
    room = arena.view(Extent(0, nbytes))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BLOCKSTREAM_CACHE"] = cache
        compute = {}
        for n, folder in folders.items():
            facts = run("resident", folder, limit=None, arguments=["--passes", str(PASSES)])
            compute[n] = statistics.median(facts["passes_s"][1:])
        for n, of in dict.fromkeys(cells):  # not counted: what it measures is planned with
            run(
                "blockstream", folders[n], limit=parse_nbytes(of), arguments=["--budget", of, "--passes", "2"]
            )
        trials: dict[tuple[int, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
        for number in range(options.rounds):
            for cell in dict.fromkeys(cells):
                trials[cell].append(trial(folders[cell[0]], cell[1], whole, room))
                said = trials[cell][-1].get("passes_s", trials[cell][-1].get("failed"))
                print(f"round {number + 1}: {cell[0]} blocks in {cell[1]}: {said}", flush=True)
    rows = [row(trials[cell], compute[cell[0]], cell[0], block, cell[1]) for cell in cells]
    found = {
        "budget": budget,
        "rounds": options.rounds,
        "sizes": rows[: len(counts)],
        "budgets": rows[len(counts) :],
    }
    if options.small:
        print(page(found))
        return
    picture = path_of("scaling", ".png")
    draw(found, picture)
    found["figure"] = picture.name
    line = f"python -m benchmarks.scaling --weights DIR --rounds {options.rounds}"
    write("scaling", line, "A pass against the model's size and the budget", page(found), found)


if __name__ == "__main__":
    main()
