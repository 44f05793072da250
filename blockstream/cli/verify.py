"""`blockstream verify CONFIG|PACK`: compare streamed with resident, or a pack with its manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blockstream.errors import ConfigError

from .common import add_config, add_json, load_config, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser, metavar="CONFIG|PACK", more=", or the folder of a pack")
    parser.add_argument(
        "--segments", action="store_true", help="compare segment by segment even what fits in memory"
    )
    add_json(parser, "what was compared")


def run(args: argparse.Namespace) -> int:
    """Compare; return 1 when there is a difference."""
    if Path(args.config).is_dir():
        return _pack(args)
    config = load_config(args.config, args.sets)

    from blockstream.report.progress import Progress
    from blockstream.report.tables import print_verify
    from blockstream.verify.comparison import verify

    with Progress() as progress:
        report = verify(config, by_segment=args.segments, observers=[progress], notice=_notice)
    if args.json:
        print_json(report)
    else:
        print_verify(report)
    return 0 if report["equal"] else 1


def _pack(args: argparse.Namespace) -> int:
    from blockstream.budget.amounts import format_nbytes
    from blockstream.checkpoint.read.manifest import MANIFEST_NAME
    from blockstream.checkpoint.write.packer import verify_pack

    folder = Path(args.config)
    if not (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"{folder} is a folder and holds no finished pack; name a config or a pack")
    if args.sets or args.segments:
        raise ConfigError(
            f"{folder} is a pack, whose hashes are compared: --set and --segments are for configs"
        )
    nbytes = verify_pack(folder)
    if args.json:
        print_json({"schema": 1, "equal": True, "pack": str(folder), "read_nbytes": nbytes})
    else:
        print(f"{folder}: {format_nbytes(nbytes)} as packed")
    return 0


def _notice(text: str) -> None:
    if sys.stderr.isatty():
        print(f"verify: {text}", file=sys.stderr)
