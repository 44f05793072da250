"""`blockstream verify coreml DIR`: compare an export with the networks it was made from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from blockstream.cli.common import add_json, load_config, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "compare Core ML packages with the networks they were made from"
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of an export")
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="a config that names the networks, where they are no longer where they were",
    )
    parser.add_argument(
        "--set", dest="sets", metavar="KEY=VALUE", action="append", default=[], help="set one key of CONFIG"
    )
    add_json(parser, "what was compared")


def run(args: argparse.Namespace) -> int:
    """Compare; return 1 when there is a difference."""
    from movd_coreml.verify import verify

    config = load_config(args.config, args.sets) if args.config else None
    report = verify(args.folder, config, _show if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["equal"] else 1


def _show(name: str, done: int, of: int) -> None:
    print(f"\r{done} of {of}: {name:40.40}", end="", file=sys.stderr, flush=True)


def _print(report: dict[str, Any]) -> None:
    for one in report["functions"]:
        what = f"{one['segment']} {one['function']}"
        print(f"{what:44} {_figures(one)}")
        for operation in one["nonfinite"]:
            print(f"    not finite: {operation}")
    print()
    for one in report["chains"]:
        what = f"{one['stage']} in whole, {one['preset']} {one['variant']}"
        print(f"{what:44} {_figures(one)}")
    print()
    print("equal" if report["equal"] else "NOT EQUAL")
    if not report["predicted"]:
        print("evaluated here, not by Core ML: that needs macOS")


def _figures(one: dict[str, Any]) -> str:
    predicted = one.get("predict_error")
    more = "" if predicted is None else f", by Core ML {predicted:.1e}"
    mark = "" if one["equal"] else "  DIFFERS"
    return f"{one['error']:.1e} of {one['tolerance']:.0e}{more}{mark}"
