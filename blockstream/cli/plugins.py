"""`blockstream plugins`: list plugins, commands and examples from metadata; --hooks imports them."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from blockstream.errors import BlockstreamError
from blockstream.plugins import entrypoints

from .common import add_json, print_json, wrapped


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--hooks", action="store_true", help="import each plugin and list its hooks and choices"
    )
    add_json(parser, "the list")


def run(args: argparse.Namespace) -> int:
    """Print what is installed; 1 when --hooks found a plugin that fails."""
    rows: list[dict[str, Any]] = [asdict(plugin) for plugin in entrypoints.plugins()]
    if args.hooks:
        for row in rows:
            if not row["hidden"]:
                several = sum(other["name"] == row["name"] for other in rows) > 1
                full = f"{row['distribution']}/" if several else ""
                row.update(_inspect(full + row["name"]))
    found = {
        "schema": 1,
        "plugins": rows,
        "commands": [asdict(command) for command in entrypoints.commands()],
        "examples": [
            asdict(replace(example, name=name)) for name, example in sorted(entrypoints.examples().items())
        ],
    }
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 1 if any("error" in row for row in rows) else 0


def _inspect(name: str) -> dict[str, Any]:
    """Return the hooks a plugin implements and what it offers, or the error it fails with."""
    from blockstream.plugins.choices import KINDS
    from blockstream.plugins.manager import Plugins

    plugins = Plugins()
    try:
        plugins.load(name)
        offers = {
            key: {item: choice.summary for item, choice in plugins.offers(key, name).items()} for key in KINDS
        }
        offers["model family"] = {f.name: f.summary for f in plugins.families(name).values()}
    except BlockstreamError as error:
        return {"error": str(error)}
    return {
        "hooks": list(plugins.hooks_of(name)),
        "offers": {key: items for key, items in offers.items() if items},
    }


def _print(found: dict[str, Any]) -> None:
    for title in ("plugins", "commands", "examples"):
        rows = found[title]
        if not rows:
            continue
        print(f"{title}:")
        name_width = max(len(row["name"]) for row in rows)
        value_width = max(len(row["value"]) for row in rows)
        for row in rows:
            provider = f"{row['distribution']} {row['version']}"
            hidden = "  (hidden by BLOCKSTREAM_DISABLE)" if row["hidden"] else ""
            print(f"  {row['name']:<{name_width}}  {row['value']:<{value_width}}  {provider}{hidden}")
            _print_inspected(row)


def _print_inspected(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"      fails: {row['error']}")
    if "hooks" in row:
        print(wrapped(f"      hooks: {', '.join(row['hooks']) or 'none'}", indent=10))
    for key, items in row.get("offers", {}).items():
        for item, summary in items.items():
            print(wrapped(f"      {key} {item}{f': {summary}' if summary else ''}", indent=10))
