"""`blockstream run CONFIG`: run a config and write its result to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.errors import ConfigError

from .common import add_config, add_json, json_stream, load_config, print_json

if TYPE_CHECKING:
    from blockstream.run.config import RunConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser, optional=True)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write; refused when it is not empty"
    )
    where.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the interrupted run in DIR, by default with DIR/config.yaml",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left in the folder"
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="keep a result with NaN or overflowed numbers, with a warning, instead of ending the run",
    )
    add_json(parser, "the report")
    parser.add_argument(
        "--json-lines",
        action="store_true",
        help="print what is known of the run twice a second, a line of JSON each, and the report as the last",
    )


def _config(args: argparse.Namespace) -> RunConfig:
    """Return the config that is named, else the one of the run that is gone on with."""
    from blockstream.run.resume import config_of

    sets = [*args.sets, *(["allow_nonfinite=true"] if args.allow_nonfinite else [])]
    return load_config(args.config or config_of(args.resume), sets)


def run(args: argparse.Namespace) -> int:
    """Run the config, print predicted against measured and where the files are."""
    if args.resume is not None and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; choose one")
    if args.config is None and args.resume is None:
        raise ConfigError("name a config, e.g. blockstream run movd.yaml, or --resume DIR")
    config = _config(args)

    from blockstream.report.feed import Feed, write_line
    from blockstream.report.progress import Progress
    from blockstream.report.summary import print_run
    from blockstream.run import runner

    with Progress() as progress, Feed(progress, json_stream()) if args.json_lines else nullcontext():
        report = runner.run(
            config,
            args.resume or args.out,
            resume=args.resume is not None,
            overwrite=args.overwrite,
            observers=[progress],
        )
    if args.json_lines:
        write_line(json_stream(), {"report": report})
    elif args.json:
        print_json(report)
    else:
        print_run(report)
        print_made(report, args.resume or progress.out)
    return 0


def print_made(report: Mapping[str, Any], out: Path | None) -> None:
    """Print where the files are that a run made."""
    files = report.get("output", {}).get("files", [])
    if out is None or not files:
        return
    paths = [str(out / name) for name in files]
    more = f" to {paths[-1]}" if len(paths) > 1 else ""
    print(f"made     {paths[0]}{more}")
