"""`blockstream plugins new NAME`: write a package with a plugin, its entry point and a test that passes."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from blockstream.errors import ConfigError
from blockstream.plugins import entrypoints
from blockstream.system.atomic import move

from .plugin_templates import KINDS, files_of

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="what configs call the plugin, such as leaps")
    parser.add_argument("--kind", choices=sorted(KINDS), default="sampler", help="what it offers")
    parser.add_argument(
        "--into", type=Path, default=Path(), metavar="DIR", help="folder to write blockstream-NAME in"
    )


def run(args: argparse.Namespace) -> int:
    """Write the package and print what to do next."""
    folder = write(args.name, args.kind, args.into)
    print(f"{folder}: a {args.kind} to start from. Next:")
    print(f"  cd {folder}")
    print("  python -m pip install --editable '.[test]'")
    print("  python -m pytest")
    print("  blockstream plugins --hooks")
    return 0


def write(name: str, kind: str, into: Path) -> Path:
    """Write the package of a plugin and return its folder.

    Raises ConfigError for a name that cannot be one, or is taken by a folder or an installed plugin.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a plugin; write lower-case letters, digits and -, as in leaps"
        )
    taken = [p for p in entrypoints.plugins() if p.name == name]
    if taken:
        raise ConfigError(
            f"a plugin {name!r} is installed already, from {taken[0].provider}; choose another name"
        )
    folder = into / f"blockstream-{name}"
    if folder.exists():
        raise ConfigError(f"{folder} exists already; remove it or choose another name")
    into.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=into))
    try:
        for path, text in files_of(name, kind).items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
