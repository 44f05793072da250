"""`blockstream plan CONFIG`: predict a run without making it."""

from __future__ import annotations

import argparse

from .common import add_config, add_json, load_config, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser)
    add_json(parser, "the plan")


def run(args: argparse.Namespace) -> int:
    """Plan the config and print what stays in memory, the predicted times and the peak."""
    config = load_config(args.config, args.sets)

    from blockstream import runner
    from blockstream.report.outlook import print_plan

    plan = runner.plan(config)
    if args.json:
        print_json(plan)
    else:
        print_plan(plan)
    return 0
