"""Race the retention policies on a real run: 28 blocks, half of them retained, l near 2 e, 8 passes.

    python -m benchmarks.policies_run [--rounds 5] [--passes 8]     # 2.7 GB of weights, a few minutes

The number of tokens is chosen from two short runs so that a load takes about twice a block's compute; reads
are not throttled. Every policy has the memory of 14 blocks and two slots; prefix, spread and none take turns
with two slots, `auto` may use the same bytes otherwise. Simulated, 28 equal segments and many passes: spread
is 1.33 times faster than prefix at l = 2 e.
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
from benchmarks._results import load, summary, table, write
from benchmarks.resident import interval
from benchmarks.streaming import drop_cached
from blockstream.streaming.session import Session
from blockstream.system.limits import cpu_count

POLICIES = ("prefix", "spread", "auto", "none")
RETAINED, SLOTS = 14, 2
RATIO = 2.0
GOALS = {"spread over prefix": 1.15, "auto behind the best": 0.03}


def one(folder: Path, tokens: int, passes: int, policy: str, arena: int) -> dict[str, Any]:
    """Run some passes under a policy; return what they took and what the ledger says."""
    drop_cached(folder)
    ids = t5_xxl.tokens(tokens)
    slots = None if policy == "auto" else SLOTS
    with torch.inference_mode(), Session(arena=arena, policy=policy, slots=slots) as s:
        module = s.stage("t5", lambda: t5_xxl.build(folder), folder, passes=passes, example_inputs=(ids,))
        predicted = s.draft().predicted.wall_s
        s.start()
        passes_s = []
        for _ in range(passes):
            begin = time.perf_counter()
            module(ids)
            passes_s.append(time.perf_counter() - begin)
        stage = s.report()["stages"][0]
        s.remember()
    plan = f"{stage['policy']}, {stage['d']} + {stage['slots']}"
    return {
        "wall_s": sum(passes_s),
        "passes_s": passes_s,
        "predicted_s": predicted,
        "plan": plan,
        **{k: stage[k] for k in ("l_s", "e_s", "stall_s", "overlap", "read_nbytes")},
    }


def tokens_for(folder: Path, arena: int) -> int:
    """Return how many tokens make a load take about `RATIO` times a block's compute."""
    tokens = 128
    for _ in range(3):
        found = one(folder, tokens, 2, "spread", arena)
        tokens = max(8, min(1024, round(tokens * found["l_s"] / (RATIO * found["e_s"]))))
    return tokens


def page(found: dict[str, list[dict[str, Any]]], tokens: int, passes: int) -> str:
    times = {p: summary([r["wall_s"] for r in rs]) for p, rs in found.items()}
    every = [r for rs in found.values() for r in rs]
    l_s, e_s = (statistics.median(r[k] for r in every) for k in ("l_s", "e_s"))
    rows = [
        (
            policy,
            rs[-1]["plan"],
            times[policy]["median"],
            f"{times[policy]['range'][0]:.2f} to {times[policy]['range'][1]:.2f}",
            " ".join(f"{x:.2f}" for x in times[policy]["trials"]),
            statistics.median(r["predicted_s"] for r in rs),
            statistics.median(r["stall_s"] for r in rs),
            statistics.median(r["read_nbytes"] for r in rs) / 1e9,
        )
        for policy, rs in found.items()
    ]
    gain = times["prefix"]["median"] / times["spread"]["median"]
    best = min(t["median"] for t in times.values())
    behind = times["auto"]["median"] / best - 1
    fastest = min(("prefix", "spread", "none"), key=lambda p: times[p]["median"])
    pairs = [a["wall_s"] / b["wall_s"] for a, b in zip(found["auto"], found[fastest], strict=True)]
    low, high = interval(pairs)
    same = sum(a["plan"] == b["plan"] for a, b in zip(found["auto"], found[fastest], strict=True))
    head = ("policy", "plan", "median s", "range", "trials", "predicted s", "stalled s", "read GB")
    ok = {
        "spread over prefix": gain >= GOALS["spread over prefix"],
        "auto behind the best": behind <= GOALS["auto behind the best"],
    }
    return "\n".join(
        [
            f"28 blocks of 96 MB, {tokens} tokens, {passes} passes, the memory of {RETAINED} blocks and "
            f"{SLOTS} slots. Loads took {1e3 * l_s:.1f} ms and blocks {1e3 * e_s:.1f} ms: l = "
            f"{l_s / e_s:.2f} e, set by the number of tokens.",
            "",
            table(head, rows),
            "",
            f"spread is {gain:.2f} times faster than prefix (the goal is {GOALS['spread over prefix']}"
            f"{'' if ok['spread over prefix'] else ', MISSED'}); auto is {behind:.1%} behind the best (the "
            f"goal is {GOALS['auto behind the best']:.0%} at most"
            f"{'' if ok['auto behind the best'] else ', MISSED'}).",
            "",
            f"Round by round, {fastest} and auto within seconds of each other, auto takes "
            f"{statistics.median(pairs):.3f} times as long (95% interval of the median {low:.3f} to "
            f"{high:.3f}). In {same} of {len(pairs)} rounds auto ended with the policy, the number of "
            f"segments retained and the slots of {fastest}; which segments those are follows what was "
            f"measured.",
            "",
            load(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--weights", type=Path, help="folder to keep the weights in")
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as cache:
        os.environ["BLOCKSTREAM_CACHE"] = cache
        folder = t5_xxl.checkpoint(options.weights or Path(made) / "deep", "deep")
        arena = (RETAINED + SLOTS) * (t5_xxl.block_nbytes(folder) + (64 << 10))
        tokens = tokens_for(folder, arena)
        found: dict[str, list[dict[str, Any]]] = {p: [] for p in POLICIES}
        for n in range(options.rounds):
            turn = POLICIES[n % len(POLICIES) :] + POLICIES[: n % len(POLICIES)]
            # Backwards every second time, so that none always follows the same other.
            for policy in turn[:: 1 if n // len(POLICIES) % 2 == 0 else -1]:
                found[policy].append(one(folder, tokens, options.passes, policy, arena))
                print(f"round {n + 1} {policy}: {found[policy][-1]['wall_s']:.2f} s", flush=True)
    command = f"python -m benchmarks.policies_run --rounds {options.rounds} --passes {options.passes}"
    text = page(found, tokens, options.passes)
    write(
        "policies-run", command, "Retention policies on a real run", text, {"tokens": tokens, "runs": found}
    )


if __name__ == "__main__":
    main()
