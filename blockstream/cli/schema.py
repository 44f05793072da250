"""`blockstream schema [CONFIG]`: print the JSON Schema of config files."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_config, json_alone, print_json, read_document


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser, optional=True)
    parser.add_argument(
        "--plugin",
        dest="plugins",
        metavar="NAME",
        action="append",
        default=[],
        help="include what this plugin offers; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Print the schema with the built-in choices, those of CONFIG's plugins and of --plugin."""
    with json_alone():
        print_json(_of_choices(args))
    return 0


def _of_choices(args: argparse.Namespace) -> dict[str, Any]:
    from blockstream.plugins.manager import Plugins
    from blockstream.run.config import choose
    from blockstream.run.json_schema import config_schema, offered_by
    from blockstream.run.validation import Problem, raise_problems

    plugins = Plugins()
    names = ["builtin"] if "builtin" in plugins.visible else []
    pipeline = {}
    if args.config is not None:
        document = read_document(args.config, args.sets)
        problems: list[Problem] = []
        chosen = choose(document, plugins, problems)
        raise_problems(document, problems)
        names += plugins.loaded
        pipeline = {one.ref: one.choice for one in chosen["pipeline"].values()}
    offered = offered_by(plugins, [*names, *args.plugins])
    if pipeline:
        offered["pipeline"] = pipeline
    return config_schema(offered)
