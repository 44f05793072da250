"""Compare LPL with its rivals at equal passes on flows whose answer is known.

    python -m benchmarks.lpl_toy [--samples 32]

For each sample: LPL's own number of passes; the distance of its result to the one of all 30 steps, and to the
solution (2000 steps), beside those of plain Euler and of Adams-Bashforth 2 with as many passes. dB is
10 log10 of the sample's mean square over the error's. Writes benchmarks/results/DATE-lpl-toy.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blockstream_lpl import sample
from torch import Tensor

from benchmarks.rivals import ab2, euler_steps
from benchmarks.toy_flows import MIXTURES, Mixture, MixtureFlow

STEPS = 30
WAYS: dict[str, dict[str, Any]] = {
    "tolerance 0.003": {"tolerance": 0.003},
    "tolerance 0.01": {"tolerance": 0.01},
    "tolerance 0.03": {"tolerance": 0.03},
    "leap 2": {"leap": 2},
}


def decibels(got: Tensor, want: Tensor) -> float:
    return float(10 * torch.log10(want.square().mean() / (got - want).square().mean().clamp_min(1e-20)))


def trial(mixture: Mixture, samples: int) -> dict[str, list[dict[str, Any]]]:
    """Return one row a way and sample."""
    noise, prompts = mixture.noise(samples), mixture.prompts(samples)
    full = euler_steps(MixtureFlow(mixture, prompts, STEPS), noise)
    solution = euler_steps(MixtureFlow(mixture, prompts, 2000), noise)
    rivals = {"euler": euler_steps, "ab2": ab2}
    fewer = {
        (name, n): rival(MixtureFlow(mixture, prompts, n), noise)
        for name, rival in rivals.items()
        for n in range(5, STEPS + 1)
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for way, options in WAYS.items():
        for s in range(samples):
            flow = MixtureFlow(mixture, prompts[s : s + 1], STEPS)
            got = partial(sample, **options)(flow, noise[s : s + 1])[0]
            results = {"lpl": got, **{name: fewer[name, flow.passes][s] for name in rivals}}
            row: dict[str, Any] = {"passes": flow.passes}
            for name, result in results.items():
                row[name] = round(decibels(result, full[s]), 2)
                row[f"{name}_solution"] = round(decibels(result, solution[s]), 2)
            rows.setdefault(way, []).append(row)
    return rows


def spread(values: list[float]) -> str:
    """Return a median and a tenth percentile."""
    low = statistics.quantiles(values, n=10)[0] if len(values) > 1 else values[0]
    return f"{statistics.median(values):.1f} ({low:.1f})"


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# LPL on flows whose answer is known, {result['date']}",
        "",
        f"    {result['command']}",
        "",
        f"{result['samples']} samples each. dB to the result of all {STEPS} steps, median (10th percentile),",
        "at the passes that LPL took for that sample; wins: samples where LPL is nearer than both rivals.",
        "Below 10 dB a rival went to another component: the first steps decide which, and fewer are coarser.",
    ]
    names = ("lpl", "euler", "ab2")
    for target, suffix in ((f"all {STEPS} steps", ""), ("the solution", "_solution")):
        lines += [
            "",
            f"## Distance to {target}",
            "",
            "| flow | LPL | passes | LPL dB | Euler dB | AB2 dB | wins |",
            "|---" * 7 + "|",
        ]
        for flow, ways in result["rows"].items():
            for way, rows in ways.items():
                passes = sorted(row["passes"] for row in rows)
                cells = [spread([row[name + suffix] for row in rows]) for name in names]
                best = sum(row["lpl" + suffix] > max(row[n + suffix] for n in names[1:]) for row in rows)
                took = f"{statistics.median(passes):g} ({passes[0]} to {passes[-1]})"
                lines.append(f"| {flow} | {way} | {took} | {' | '.join(cells)} | {best}/{len(rows)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    today = datetime.date.today().isoformat()
    result = {
        "schema": 1,
        "suite": "lpl-toy",
        "date": today,
        "command": "python -m benchmarks.lpl_toy",
        "samples": args.samples,
        "torch": torch.__version__,
        "rows": {mixture.name: trial(mixture, args.samples) for mixture in MIXTURES},
    }
    out = Path("benchmarks/results") / f"{today}-lpl-toy.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    page = markdown(result)
    out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
