"""Compare what plans predict with what runs take, over budgets, policies and two models.

    python -m benchmarks.prediction [--rounds 3] [--passes 4]      # 1.9 GB of weights, a few minutes

Each model runs once before, uncounted: what it measures is kept and planned with, as between the runs of any
model on a machine. Then, in each round, every policy at every share of the weights: the prediction is that of
the plan made before the run (what `blockstream plan` prints), the wall time that of all forwards. The error
is |predicted - measured| / measured, the median of a point's rounds; the goal is for the median of them all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import t5_xxl
from benchmarks._results import load, table, write
from benchmarks.streaming import drop_cached
from blockstream.streaming.session import Session
from blockstream.system.limits import cpu_count

GOAL = 0.10
#: Tokens of each model: the one waits for the disk, the other for compute.
MODELS = {"medium": 64, "narrow": 256}
POLICIES = ("none", "prefix", "spread", "auto")
SHARES = (0.3, 0.5, 0.75)


def one(folder: Path, tokens: int, passes: int, policy: str, arena: int | None) -> dict[str, Any]:
    """Run some passes; return what was predicted before and what they took."""
    drop_cached(folder)
    ids = t5_xxl.tokens(tokens)
    with torch.inference_mode(), Session(arena=arena, policy=policy) as s:
        module = s.stage("t5", lambda: t5_xxl.build(folder), folder, passes=passes, example_inputs=(ids,))
        predicted = s.draft().predicted
        s.start()
        begin = time.perf_counter()
        for _ in range(passes):
            module(ids)
        wall_s = time.perf_counter() - begin
        stage = s.report()["stages"][0]
        s.remember()
    return {
        "predicted_s": predicted.wall_s,
        "wall_s": wall_s,
        "error": abs(predicted.wall_s - wall_s) / wall_s,
        "l_s": stage["l_s"],
        "e_s": stage["e_s"],
        "plan": f"{stage['policy']}, {stage['d']} + {stage['slots']}",
    }


def measure(made: Path, rounds: int, passes: int) -> list[dict[str, Any]]:
    """Return every point of the grid with its rounds."""
    points: list[dict[str, Any]] = []
    folders = {size: t5_xxl.checkpoint(made / size, size) for size in MODELS}
    for size, tokens in MODELS.items():
        block = t5_xxl.block_nbytes(folders[size])
        blocks = t5_xxl.SIZES[size]["num_layers"]
        one(folders[size], tokens, passes, "none", 3 * block + (64 << 20))
        points += [
            {
                "model": size,
                "policy": policy,
                "share": share,
                "arena": int(share * blocks * block),
                "rounds": [],
            }
            for share in SHARES
            for policy in POLICIES
        ]
    for n in range(rounds):
        for point in points:
            size = point["model"]
            found = one(folders[size], MODELS[size], passes, point["policy"], point["arena"])
            point["rounds"].append(found)
            print(
                n + 1, size, point["policy"], point["share"], {k: found[k] for k in ("predicted_s", "wall_s")}
            )
    for point in points:
        point["error"] = statistics.median(r["error"] for r in point["rounds"])
    return points


def page(points: list[dict[str, Any]], rounds: int, passes: int) -> str:
    def middle(point: dict[str, Any], name: str) -> float:
        return statistics.median(r[name] for r in point["rounds"])

    rows = [
        (
            p["model"],
            p["policy"],
            f"{p['share']:.0%}",
            p["rounds"][-1]["plan"],
            f"{1e3 * middle(p, 'l_s'):.1f}",
            f"{1e3 * middle(p, 'e_s'):.1f}",
            middle(p, "predicted_s"),
            middle(p, "wall_s"),
            f"{p['error']:.1%}",
        )
        for p in points
    ]
    error = statistics.median(p["error"] for p in points)
    worst = max(p["error"] for p in points)
    head = (
        "model",
        "policy",
        "arena of the weights",
        "plan",
        "l ms",
        "e ms",
        "predicted s",
        "measured s",
        "error",
    )
    return "\n".join(
        [
            f"The median error over {len(points)} points is {error:.1%}, the largest {worst:.1%}; the goal "
            f"is a median of {GOAL:.0%} or less{'.' if error <= GOAL else ': MISSED.'}",
            "",
            f"{passes} passes a run, medians of {rounds} rounds; medium is {MODELS['medium']} tokens through "
            f"12 blocks of 96 MB, narrow {MODELS['narrow']} through 24 of 26 MB.",
            "",
            table(head, rows),
            "",
            load(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--weights", type=Path, help="folder to keep the weights in")
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as cache:
        os.environ["BLOCKSTREAM_CACHE"] = cache
        points = measure(options.weights or Path(made), options.rounds, options.passes)
    command = f"python -m benchmarks.prediction --rounds {options.rounds} --passes {options.passes}"
    text = page(points, options.rounds, options.passes)
    write("prediction", command, "Predicted and measured", text, {"goal": GOAL, "points": points})


if __name__ == "__main__":
    main()
