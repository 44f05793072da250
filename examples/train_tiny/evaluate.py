"""Score the tiny model on seeded prompts, and write a dated result.

    python -m examples.train_tiny.evaluate --models movd/assets/tiny

Half of the prompts show combinations of the training videos, half show held-out ones. Each is sampled from
its own seed with 30 steps and guidance 3, decoded, and judged frame by frame by `checker`. Prompts are
kept in the JSON file as they finish: run it again to go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.train_tiny import checker, data, sample, train_temporal
from examples.train_tiny.data import Scene

ATTRIBUTES = ("shape", "colour", "motion", "speed", "background")


def prompts(count: int, seed: int) -> list[tuple[str, Scene]]:
    """Return `count` scenes, seen and held out in turn; none twice while there are others."""
    rng = np.random.default_rng(seed)
    pools = {}
    for name, held in (("seen", False), ("held_out", True)):
        scenes = data.scenes(held)
        rounds = -(-count // len(scenes))
        pools[name] = [scenes[i] for _ in range(rounds) for i in rng.permutation(len(scenes))]
    return [(name, pools[name][i // 2]) for i in range(count) for name in [list(pools)[i % 2]]]


def judge_truth(count: int, seed: int) -> dict[str, Any]:
    """Return how many rendered videos the checker reads fully right."""
    rng = np.random.default_rng(seed)
    everything = data.scenes()
    chosen = [everything[i] for i in rng.integers(len(everything), size=count)]
    right = sum(all(checker.read(data.render(s, rng)).judge(s).values()) for s in chosen)
    return {"videos": count, "right": right, "share": right / count}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the share of prompts right, in all and by attribute, seen and held out."""
    table = {}
    for name in ("seen", "held_out"):
        verdicts = [row["verdict"] for row in rows if row["set"] == name]
        if not verdicts:
            continue
        table[name] = {
            "prompts": len(verdicts),
            "right": float(np.mean([all(v.values()) for v in verdicts])),
            **{a: float(np.mean([v[a] for v in verdicts])) for a in ATTRIBUTES},
        }
    return table


def time_one(tiny: sample.Tiny, steps: int, guidance: float) -> dict[str, float]:
    """Return the seconds that one video takes alone, by the clock and of the processors."""
    clock, processor = time.monotonic(), time.process_time()
    sample.decode(tiny, sample.sample(tiny, ["a red circle growing slowly"], [0], steps, guidance))
    return {
        "wall_s": round(time.monotonic() - clock, 3),
        "processor_s": round(time.process_time() - processor, 3),
    }


def environment() -> dict[str, Any]:
    """Return what the result depends on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lines = [
        f"# Tiny text-to-video model, {result['date']}",
        "",
        f"    {result['command']}",
        "",
        f"{result['settings']['steps']} Euler steps, guidance {result['settings']['guidance']}, one seed a "
        "prompt. Right: shape, colour and background in at least 90% of the frames, and motion and speed.",
        "",
        "| combinations | prompts | fully right | " + " | ".join(ATTRIBUTES) + " |",
        "|---" * (3 + len(ATTRIBUTES)) + "|",
    ]
    for name, row in result["summary"].items():
        cells = " | ".join(f"{row[a]:.3f}" for a in ("right", *ATTRIBUTES))
        lines.append(f"| {name.replace('_', ' ')} | {row['prompts']} | {cells} |")
    truth, vae = result["checker_on_truth"], result["vae"]
    lines += [
        "",
        f"Checker on rendered truth: {truth['right']} of {truth['videos']}. "
        f"VAE: {vae['psnr_db']:.1f} dB PSNR; of {vae['videos']} videos that went through it, a share of "
        f"{vae['right']:.3f} is still read right.",
        f"One video alone, sampled and decoded: {result['one_video']['wall_s']:.2f} s, "
        f"{result['one_video']['processor_s']:.2f} s of processor time. Weights: "
        + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in result["weight_nbytes"].items())
        + ".",
        f"Environment: {json.dumps(result['environment'])}",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, score what is not scored yet, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("movd/assets/tiny"))
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/DATE-tiny.json")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    today = datetime.date.today().isoformat()
    out = args.out or Path("benchmarks/results") / f"{today}-tiny.json"
    settings = {name: getattr(args, name) for name in ("prompts", "batch", "steps", "guidance", "seed")}
    weights = {f.parent.name: f.stat().st_size for f in args.models.glob("*/model.safetensors")}
    result: dict[str, Any] = {
        "schema": 1,
        "suite": "tiny",
        "date": today,
        "command": "python -m examples.train_tiny.evaluate",
        "environment": environment(),
        "settings": settings,
        "weight_nbytes": weights,
        "rows": [],
    }
    if out.exists():
        before = json.loads(out.read_text())
        if before["settings"] != settings or before["weight_nbytes"] != weights:
            parser.error(f"{out} holds a result of other settings or weights; remove it or name another")
        result = before

    tiny = sample.load(args.models)
    wanted = prompts(args.prompts, args.seed)
    rows = result["rows"]
    while len(rows) < len(wanted):
        first = len(rows)
        batch = wanted[first : first + args.batch]
        seeds = [args.seed * 1000 + first + i for i in range(len(batch))]
        captions = [scene.caption() for _, scene in batch]
        latents = sample.sample(tiny, captions, seeds, args.steps, args.guidance)
        clips = sample.decode(tiny, latents)
        for (name, scene), seed, clip in zip(batch, seeds, clips, strict=True):
            verdict = checker.read(clip).judge(scene)
            rows.append(
                {
                    "prompt": scene.caption(),
                    "set": name,
                    "seed": seed,
                    "verdict": verdict,
                }
            )
        write(out, result)
        print(len(rows), json.dumps(summary(rows)), flush=True)
    result["summary"] = summary(rows)
    result["one_video"] = time_one(tiny, args.steps, args.guidance)
    result["checker_on_truth"] = judge_truth(400, args.seed)
    result["environment"] = environment()
    result["vae"] = train_temporal.reconstruct(tiny.vae, 48)
    write(out, result)
    out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
