"""`blockstream report DIR...`: draw runs again, and compare them side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from blockstream.errors import ConfigError

from .common import add_json, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="the folder of a run, finished or not, of this version or an earlier one",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="write one page with all the runs, such as compare.html"
    )
    parser.add_argument("--no-draw", action="store_true", help="leave the folders as they are")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    add_json(parser, "the figures of each run")


def run(args: argparse.Namespace) -> int:
    """Draw each folder's run, print its figures, several side by side."""
    from blockstream.report.page import compare_html
    from blockstream.report.record import read_run
    from blockstream.report.summary import print_comparison, print_record
    from blockstream.report.write import draw
    from blockstream.system.atomic import write_atomic

    if args.compare is not None and args.compare.suffix != ".html":
        raise ConfigError(f"--compare {args.compare}: name a .html file")
    records = [read_run(folder) for folder in args.folders]
    if not args.no_draw:
        for folder in args.folders:
            draw(folder)
    if args.compare is not None:
        write_atomic(args.compare, compare_html(records).encode())
    if args.json:
        runs = [{"folder": str(r.folder), "remarks": r.remarks, "report": dict(r.report)} for r in records]
        print_json({"schema": 1, "runs": runs})
    elif len(records) > 1:
        print_comparison(records)
    else:
        print_record(records[0])
    if args.open:
        pages = [args.compare] if args.compare is not None else [f / "report.html" for f in args.folders]
        for page in pages:
            show(page)
    return 0


def show(page: Path) -> None:
    """Open a page in the browser. Raises ConfigError where there is no page or no browser."""
    import webbrowser

    if not page.is_file():
        raise ConfigError(f"{page} was not drawn; leave --no-draw out, or see the message above")
    if not webbrowser.open(page.absolute().as_uri()):
        raise ConfigError(f"no browser was found here; open {page.absolute()} in one")
