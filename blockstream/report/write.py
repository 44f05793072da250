"""Write a run's pictures into its folder: report.html, timeline.png, trace.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from blockstream.system.atomic import write_atomic

from .page import report_html
from .record import RunRecord, read_run
from .timeline import timeline_png
from .trace import trace_events

log = logging.getLogger(__name__)

_MADE_BY: dict[str, Callable[[RunRecord], bytes]] = {
    "report.html": lambda record: report_html(record).encode(),
    "timeline.png": timeline_png,
    "trace.json": lambda record: json.dumps(trace_events(record), separators=(",", ":")).encode(),
}


def draw(folder: Path) -> list[Path]:
    """Write what shows the run in a folder; return what was written.

    Without matplotlib there is no timeline.png, which is said. Raises ConfigError for a folder without
    a run, or with a ledger that cannot be read.
    """
    record = read_run(folder)
    written = []
    for name, make in _MADE_BY.items():
        try:
            data = make(record)
        except ModuleNotFoundError as error:
            log.warning("no %s: %s; pip install 'blockstream-engine[report]'", name, error)
            continue
        write_atomic(folder / name, data)
        written.append(folder / name)
    return written


def draw_finished(folder: Path) -> None:
    """Draw a run that has just ended; what goes wrong is said, the result stands."""
    try:
        draw(folder)
    except Exception as error:
        log.warning(
            "%s could not be drawn: %s: %s; try: blockstream report %s",
            folder,
            type(error).__name__,
            error,
            folder,
        )
