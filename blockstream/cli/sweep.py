"""`blockstream sweep CONFIG --prompts FILE`: a run for each prompt, on this machine or many."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from blockstream.errors import ConfigError

from .common import add_config, add_json, print_json, read_document

if TYPE_CHECKING:
    from blockstream.sweep.results import Totals

#: The most prompts of one run.
MOST_BATCH = 10_000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = """Make a run for each prompt of a file, on the machines that --on names. Run
        it again to go on: what is finished is left as it is, what was stopped is resumed."""
    add_config(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", required=True, help="a text file with a prompt a line, or its URL"
    )
    parser.add_argument(
        "--out", metavar="WHERE", required=True, help="a folder that all machines see, or a URL of fsspec's"
    )
    parser.add_argument(
        "--on",
        metavar="SCHEDULER",
        default="local",
        help="local (processes of this machine), ray, or with options: '{name: ray, address: auto}'",
    )
    parser.add_argument(
        "--grid",
        metavar="KEY=[VALUE, ...]",
        action="append",
        default=[],
        help="run every prompt with each of these values; of several, with every combination",
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, default=1, help="prompts that one run makes together (default: 1)"
    )
    add_json(parser, "the report")


def run(args: argparse.Namespace) -> int:
    """Run the sweep; print what it came to."""
    if not 1 <= args.batch <= MOST_BATCH:
        raise ConfigError(f"--batch {args.batch}: 1 to {MOST_BATCH:,} prompts a run")
    document = read_document(args.config, args.sets)
    from blockstream.sweep.drive import Sweep
    from blockstream.sweep.processes import Processes
    from blockstream.sweep.tasks import grid_cells, read_prompts

    scheduler = _scheduler(args.on)
    prompts, digest = read_prompts(args.prompts)
    away = not isinstance(scheduler, Processes)
    sweep = Sweep(document, prompts, digest, args.out, grid_cells(args.grid), args.batch, away)
    if not sweep.place.is_shared:
        raise ConfigError(
            f"--out {args.out}: no other process sees this one's memory; name a folder or a URL"
        )
    with _progress() as told:
        report = sweep.run(scheduler, told)
    if args.json:
        print_json(report)
    else:
        _print(report, args.out)
    return 0 if report["done"] == report["runs"] else 1


def _scheduler(text: str) -> Any:
    """Return the scheduler that a name, or a mapping of name and options, means."""
    from blockstream.plugins import Plugins
    from blockstream.plugins.choices import Chosen
    from blockstream.run.validation import raise_problems, refuse_keys, validate
    from blockstream.run.yamlfile import Document, with_set

    document = with_set(Document("--on", {}), f"on={text}")
    written = document.data["on"]
    given = {k: v for k, v in written.items() if k != "name"} if isinstance(written, dict) else {}
    ref = written.get("name") if isinstance(written, dict) else written
    if not isinstance(ref, str):
        raise ConfigError(f"--on {text}: write a name, or a mapping with name and options")
    plugin, choice = Plugins().find("scheduler", ref)
    if choice.options is None:
        raise_problems(document, refuse_keys(given, ("on",)))
        return Chosen("scheduler", ref, plugin, choice).build()
    options, problems = validate(choice.options, given, ("on",))
    raise_problems(document, problems)
    return Chosen("scheduler", ref, plugin, choice, options).build()


@contextmanager
def _progress() -> Iterator[Callable[[Totals], None]]:
    """Show on a terminal how many runs have ended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("runs")

        def told(totals: Totals) -> None:
            failed = f"runs, {len(totals.failed)} failed" if totals.failed else "runs"
            ended = len(totals.done) + len(totals.failed)
            bar.update(shown, description=failed, completed=ended, total=totals.runs)

        yield told


def _print(report: Mapping[str, Any], out: str) -> None:
    from rich.console import Console

    from blockstream.budget.amounts import format_nbytes
    from blockstream.report.curve import seconds
    from blockstream.report.tables import lines

    where = {name: n for name, n in report["where"].items() if name}
    rows = [
        (
            "runs",
            f"{report['done']} of {report['runs']} done, {report['failed']} failed",
            report["failed"] > 0,
        ),
        ("prompts", f"{report['prompts_done']} of {report['prompts']}", False),
        ("resumed", f"{report['resumed']} runs went on after whatever made them had died", False),
        ("time", f"{seconds(report['elapsed_s'])}; the runs together {seconds(report['wall_s'])}", False),
        ("disk", f"read {format_nbytes(report['read_nbytes'])}", False),
        ("memory", f"at most {format_nbytes(report['peak_nbytes'])} a run", report["budget_exceeded"] > 0),
        ("on", f"{len(where)} machines or processes", False),
        ("made", f"{out}/runs, {out}/results, {out}/report.json", False),
    ]
    rows += [("failed", f"{f['run']}: {f['error']}", True) for f in report["failures"][:5]]
    Console().print(lines(rows))
