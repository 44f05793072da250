"""Draw a run that has ended, within its budget."""

from __future__ import annotations

import logging
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.report.write import draw_finished
from blockstream.system.memory import MemoryWatch, held, trim_heap

from .folder import RunFolder, write_report

log = logging.getLogger(__name__)

#: What drawing a run of any length takes, matplotlib included.
DRAWING_NBYTES = 48 << 20


def draw(folder: RunFolder, report: dict[str, Any]) -> None:
    """Draw a run within its budget; what that takes belongs to the report's verdict."""
    budget = report["budget"]
    trim_heap()
    room = budget["nbytes"] - held().nbytes
    if room < DRAWING_NBYTES:
        log.warning(
            "%s is not drawn: the budget leaves %s and drawing takes %s; it can be: blockstream report %s",
            *(folder.path, format_nbytes(max(0, room)), format_nbytes(DRAWING_NBYTES), folder.path),
        )
        return
    with MemoryWatch(budget["nbytes"]) as watch:
        draw_finished(folder.path)
    if watch.peak_nbytes > budget["peak_nbytes"]:
        budget |= {
            "peak_nbytes": watch.peak_nbytes,
            "held": budget["held"] and not watch.broken,
            "by_cause": watch.by_cause(runtime=budget["by_cause"].get("runtime", 0), activations=0),
            "peak_at_s": report["wall_s"],
            "peak_during": "drawing the run",
        }
        write_report(folder, report)
