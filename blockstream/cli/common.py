"""What several commands share: the CONFIG argument, and output for people or for programs."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from blockstream.budget.amounts import headroom_part

if TYPE_CHECKING:
    from blockstream.run.config import RunConfig
    from blockstream.run.yamlfile import Document


def add_config(
    parser: argparse.ArgumentParser, optional: bool = False, metavar: str = "CONFIG", more: str = ""
) -> None:
    """Add CONFIG and --set to a command; `more` is what else CONFIG may be."""
    parser.add_argument(
        "config",
        metavar=metavar,
        nargs="?" if optional else None,
        help=f"a YAML file, or the name of a packaged example such as movd.yaml{more}",
    )
    parser.add_argument(
        "--set",
        dest="sets",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set one key, e.g. --set steps=10 or --set sampler.tau=0.1; may be repeated",
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --json to a command."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def read_document(name: str, sets: list[str]) -> Document:
    """Return the document of a config; a packaged example is announced on stderr."""
    from blockstream.run.config import read_config

    document = read_config(name, sets)
    if document.packaged is not None:
        print(f"{document.name}: the example packaged in {document.packaged}", file=sys.stderr)
    return document


def load_config(named: str | Document, sets: list[str]) -> RunConfig:
    """Return the validated configuration of a config, which may have been read already."""
    from blockstream.run.config import make_config, with_sets
    from blockstream.system.runtime_floor import refuse_too_little

    document = read_document(named, sets) if isinstance(named, str) else with_sets(named, sets)
    budget = document.data.get("budget")
    is_part = budget is None or (isinstance(budget, str) and headroom_part(budget) is not None)
    refuse_too_little(swapping=not is_part)  # before torch is imported, which may be more than there is
    return make_config(document)


def wrapped(text: str, indent: int) -> str:
    """Return a line broken between words where the terminal ends; what follows is indented."""
    return textwrap.fill(
        text,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


_json_to: ContextVar[TextIO | None] = ContextVar("blockstream_json_to", default=None)


@contextmanager
def json_alone() -> Iterator[None]:
    """Let nothing but `print_json` print to stdout for the length of the block: the rest goes to stderr."""
    token = _json_to.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_to.reset(token)


def json_stream() -> TextIO:
    """Return what JSON is written to: stdout, also where the rest goes to stderr."""
    return _json_to.get() or sys.stdout


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    out = json_stream()
    json.dump(value, out, indent=2, ensure_ascii=False)
    print(file=out)
