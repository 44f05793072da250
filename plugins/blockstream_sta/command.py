"""`blockstream sta search CONFIG`: run a config and write which windows each head loses least by."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from blockstream.cli.common import add_config, load_config
from blockstream.errors import ConfigError

if TYPE_CHECKING:
    from .tiles import Window

DESCRIPTION = """Make the config's videos with dense attention and measure, in every layer, head and step, how
far each candidate window is from it. The table goes to --table; use it with
`attention: [{name: sta, table: FILE}]`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = DESCRIPTION
    add_config(parser)
    parser.add_argument("--table", metavar="FILE", type=Path, required=True, help="the table to write")
    parser.add_argument(
        "--window",
        dest="windows",
        metavar="T,H,W",
        action="append",
        required=True,
        help="a candidate, in tiles; several of about one density",
    )
    parser.add_argument("--tile", metavar="T,H,W", default="6,8,8", help="tokens of a tile (default: 6,8,8)")
    parser.add_argument(
        "--dense-steps",
        metavar="N",
        default="0.3",
        help="first steps that see everything: 15, or a share: 0.3",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="the folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")


def run(args: argparse.Namespace) -> int:
    """Run the search and print what the table came to."""
    from blockstream.run.runner import run as run_config

    from .table import Table
    from .tiles import Tiling

    if args.table.exists() and not args.overwrite:
        raise ConfigError(f"{args.table} is there already; name another file, or --overwrite")
    chosen = {
        "name": "sta:search",
        "table": str(args.table.absolute()),
        "windows": [_sizes(text) for text in args.windows],
        "tile": _sizes(args.tile),
        "dense_steps": json.loads(args.dense_steps),
    }
    sets = [*args.sets, f"attention={json.dumps([chosen])}", "sampler=euler"]
    config = load_config(args.config, sets)
    run_config(config, args.out, overwrite=args.overwrite)
    table = Table.read(args.table)
    steps, layers, heads = table.choice.shape
    tiling = Tiling(table.canvas, table.tile)
    print(
        f"{args.table}: {steps} steps, {layers} layers of {heads} heads on {'x'.join(map(str, table.canvas))}"
    )
    for n, window in enumerate(table.windows):
        share = float((table.choice == n).double().mean())
        shown, density = "x".join(map(str, window)), tiling.density(window)
        print(f"  {shown:>8}  {share:6.1%} of the heads, density {density:.3f}")
    mean = sum(map(table.density, range(steps))) / steps
    print(f"  all steps: {mean:.3f} of the pairs of tokens")
    return 0


def _sizes(text: str) -> Window:
    try:
        t, h, w = (int(n) for n in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{text!r}: write three numbers, along time, height and width: 3,3,3") from error
    return t, h, w
