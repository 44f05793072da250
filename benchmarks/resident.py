"""Measure what streaming costs where nothing needs to be streamed: all weights in memory, the hooks gone.

    python -m benchmarks.resident [--pairs 20] [--forwards 20]

A small T5 encoder (12 blocks, an embedding that is held and not read by row), whose forward is short enough
for a cost per visit to show, computes beside the plain module: pairs of trials take turns, each of
`--forwards` forwards. Reported is the ratio of the two times, streamed over plain, with a bootstrap 95%
interval of its median. The same with the hooks kept on, for comparison: there some blocks are streamed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import blockstream
from benchmarks import t5_xxl
from benchmarks._results import load, summary, table, write
from blockstream.module.empty import empty
from blockstream.system.limits import cpu_count

#: What the interval of the ratio has to reach: no cost that can be told from noise.
GOAL = 1.02
RESAMPLES = 10_000
TOKENS = 32


def plain(folder: Path) -> nn.Module:
    """Return the encoder as one would have it without blockstream, weights in memory of its own."""
    with empty():
        module = t5_xxl.build(folder)
    weights = {k: v.clone() for path in t5_xxl.files(folder) for k, v in load_file(path).items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    module.load_state_dict(weights, assign=True)
    return module


def seconds(module: nn.Module, ids: torch.Tensor, forwards: int) -> float:
    begin = time.perf_counter()
    for _ in range(forwards):
        module(ids)
    return time.perf_counter() - begin


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap 95% interval of the median."""
    draws = random.Random(seed)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def pairs(one: nn.Module, other: nn.Module, ids: torch.Tensor, count: int, forwards: int) -> dict[str, Any]:
    """Return the times of both, alternating which comes first, and the ratio of each pair."""
    mine, theirs = [], []
    timed: list[tuple[nn.Module, list[float]]] = [(one, mine), (other, theirs)]
    for _ in range(count):
        for module, found in timed:
            found.append(seconds(module, ids, forwards))
        timed.reverse()
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    low, high = interval(ratios)
    return {
        "streamed_s": summary(mine),
        "plain_s": summary(theirs),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
    }


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def measure(folder: Path, arena: int, count: int, forwards: int) -> dict[str, Any]:
    """Return the pairs for an arena, after a warm-up that ends with everything in memory that is to be."""
    ids = t5_xxl.tokens(TOKENS) % 1024
    other = plain(folder)
    with torch.inference_mode(), blockstream.open(arena=arena) as s:
        one = s.stage("t5", lambda: t5_xxl.build(folder), folder, passes=None)
        for _ in range(3):
            same = torch.equal(one(ids).last_hidden_state, other(ids).last_hidden_state)
            assert same, "streamed and plain give the same bits"
        seconds(one, ids, forwards), seconds(other, ids, forwards)
        found = pairs(one, other, ids, count, forwards)
        return {**found, "hooks": hooks(one), "retained": len(s.plan.stages[0].retained)}


def page(found: dict[str, dict[str, Any]], forwards: int) -> str:
    rows = [
        (
            name,
            f["hooks"],
            1e3 * f["streamed_s"]["median"] / forwards,
            1e3 * f["plain_s"]["median"] / forwards,
            f"{f['ratio']:.4f}",
            f"{f['interval'][0]:.4f} to {f['interval'][1]:.4f}",
        )
        for name, f in found.items()
    ]
    reached = found["all in memory"]["interval"][0] <= GOAL
    head = ("", "hooks", "streamed ms", "plain ms", "ratio", "95% interval")
    return "\n".join(
        [
            f"A forward of {TOKENS} tokens, medians of {len(found['all in memory']['ratios'])} alternating "
            f"pairs of {forwards} forwards each:",
            "",
            table(head, rows),
            "",
            f"With everything in memory the interval {'reaches' if reached else 'DOES NOT REACH'} {GOAL} or "
            f"lower. The second row is what hooks and the blocks streamed at each pass cost. {load()}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--forwards", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    with tempfile.TemporaryDirectory() as made:
        folder = t5_xxl.checkpoint(Path(made) / "t5", "plain")
        block = t5_xxl.block_nbytes(folder)
        cases: dict[str, Callable[[], int]] = {
            "all in memory": lambda: 20 * block,
            "streamed": lambda: 8 * block,
        }
        found = {n: measure(folder, a(), options.pairs, options.forwards) for n, a in cases.items()}
    write(
        "resident",
        f"python -m benchmarks.resident --pairs {options.pairs} --forwards {options.forwards}",
        "What streaming costs with everything in memory",
        page(found, options.forwards),
        {"goal": GOAL, "cases": found},
    )


if __name__ == "__main__":
    main()
