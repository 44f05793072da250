"""`blockstream vbench run CONFIG`: make the videos of VBench's prompts; go on where it stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from blockstream.cli.common import add_config, load_config
from blockstream.errors import ConfigError

from .prompts import part_of, read_prompts

#: How many videos VBench wants of each prompt.
SAMPLES = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = """Run a config on VBench's prompts, category by category, several samples of each.
        Run it again to go on: what is finished is skipped, what was stopped is resumed."""
    add_config(parser)
    parser.add_argument(
        "--prompts",
        metavar="PATH",
        type=Path,
        required=True,
        help="a JSON file, or VBench's folder of texts",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the runs")
    parser.add_argument(
        "--category", metavar="NAME", action="append", help="one category alone; may be repeated"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=SAMPLES, help=f"videos a prompt (default: {SAMPLES})"
    )
    parser.add_argument(
        "--part", metavar="K/N", default="1/1", help="every Nth prompt from the Kth on, for one of N machines"
    )


def run(args: argparse.Namespace) -> int:
    """Make what is missing."""
    from blockstream.run.runner import run as run_config

    if args.samples < 1:
        raise ConfigError(f"--samples {args.samples}: at least 1")
    part = _part(args.part)
    prompts = read_prompts(args.prompts, args.category)
    first = _seed(args)
    for sample in range(args.samples):
        for category, all_of_it in prompts.items():
            mine = part_of(all_of_it, part)
            if not mine:
                continue
            folder = args.out / f"sample-{sample}" / _named(category, part)
            if (folder / "report.json").is_file():
                print(f"{folder}: finished")
                continue
            sets = [*args.sets, f"prompts={json.dumps(mine)}", f"seed={first + sample}"]
            begun = (folder / "config.yaml").is_file()
            print(f"{folder}: {len(mine)} prompts{', going on' if begun else ''}")
            run_config(load_config(args.config, sets), folder, resume=begun)
    return 0


def _named(category: str, part: tuple[int, int]) -> str:
    return category if part == (1, 1) else f"{category}-{part[0]}-of-{part[1]}"


def _seed(args: argparse.Namespace) -> int:
    """Return the config's own seed; sample i takes the ith after it. A config without one begins at 0."""
    options: Any = load_config(args.config, [*args.sets, 'prompts=["a"]']).pipeline.options
    seed = getattr(options, "seed", 0)
    return seed if isinstance(seed, int) else 0


def _part(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n):
        return int(k), int(n)
    raise ConfigError(f"--part {text}: write K/N, such as 2/4 for the second of four machines")
