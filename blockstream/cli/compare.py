"""`blockstream compare RUN RUN`: what two runs made of the same prompts, measured and side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from blockstream.errors import ConfigError

from .common import add_json, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("first", metavar="RUN", type=Path, help="the folder of a run: what is compared with")
    parser.add_argument("second", metavar="RUN", type=Path, help="the folder of another, of the same prompts")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="write a page with the videos side by side, such as pairs.html",
    )
    add_json(parser, "the measures")


def run(args: argparse.Namespace) -> int:
    """Measure each pair of results, print the table, write the page."""
    from rich.console import Console

    from blockstream.report.pairs import as_json, measure, medians, paired, rows
    from blockstream.report.record import names_of, read_run
    from blockstream.report.side_by_side import side_by_side_html
    from blockstream.report.tables import grid
    from blockstream.system.atomic import write_atomic

    if args.out is not None and args.out.suffix != ".html":
        raise ConfigError(f"--out {args.out}: name a .html file")
    a, b = read_run(args.first), read_run(args.second)
    files, remarks = paired(a, b)
    pairs = [measure(*pair) for pair in files]
    if args.out is not None:
        first, second = names_of([a, b])
        write_atomic(args.out, side_by_side_html((first, second), pairs, remarks).encode())
    if args.json:
        middle = {k: None if v == float("inf") else v for k, v in medians(pairs).items()}
        runs = [str(a.folder), str(b.folder)]
        print_json({"schema": 1, "runs": runs, "pairs": as_json(pairs), "median": middle, "remarks": remarks})
        return 0
    console = Console()
    console.print(grid(rows(pairs)))
    for remark in (*remarks, *(f"{p.prompt}: {p.remark}" for p in pairs if p.remark)):
        console.print(remark, soft_wrap=True, markup=False)
    return 0
