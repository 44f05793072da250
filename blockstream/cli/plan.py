"""`blockstream plan CONFIG|MODEL`: predict a run without making it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_config, add_json, load_config, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    also = "; or one model: its folder, a config.json, a checkpoint's file, a model family's name"
    add_config(parser, metavar="CONFIG|MODEL", more=also)
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="run nothing: predict by what is known already, and by operations and bytes",
    )
    add_json(parser, "the plan")


def run(args: argparse.Namespace) -> int:
    """Plan a config, or one model, and print what stays, the times, the peak and the budget curve."""
    plan = _plan(args.config, args.sets, not args.no_measure)
    if args.json:
        print_json(plan)
        return 0
    from blockstream.report.outlook import print_plan

    print_plan(plan)
    return 0


def _plan(ref: str, sets: list[str], measure: bool) -> dict[str, Any]:
    if is_config(ref):
        config = load_config(ref, sets)

        import blockstream.report.progress  # noqa: F401  # the least is that of a run, which shows it
        from blockstream.run import runner

        return runner.plan(config, measure)
    from blockstream.streaming.model_plan import plan_model

    return plan_model(ref, sets)


def is_config(ref: str) -> bool:
    """Return whether a name is a config's: a YAML file, or a packaged example."""
    from blockstream.plugins.entrypoints import examples

    packaged = examples()
    return Path(ref).suffix in (".yaml", ".yml") or ref in packaged or f"{ref}.yaml" in packaged
