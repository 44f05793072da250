"""What loads and computes of a stage cost: guessed before the first pass, measured after it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from blockstream.ledger import Ledger
from blockstream.segments import Segment, Stage

if TYPE_CHECKING:
    from .stage import StreamedStage

#: Bytes a second, before anything has been measured: a common NVMe disk, and compute half as slow.
READ_SPEED = 1.2e9
COMPUTE_SPEED = 2.4e9


def default_costs(stage: StreamedStage) -> Stage:
    """Return a stage with costs guessed from sizes."""
    segments = []
    for part in stage.prepared.parts:
        layout = stage.prepared.layouts[part.name]
        segments.append(
            Segment(
                part.name,
                layout.nbytes,
                load_s=layout.read_nbytes / READ_SPEED,
                execute_s=layout.bound_nbytes / COMPUTE_SPEED,
                read_nbytes=layout.read_nbytes,
                resident=part.resident,
            )
        )
    return Stage(stage.name, tuple(segments), stage.full_order, stage.passes)


def measured_costs(stage: Stage, index: int, ledger: Ledger) -> Stage:
    """Return the stage with the median load and execution times the ledger has of it.

    Segments not seen yet take the speed of those that were.
    """
    loads: dict[str, list[float]] = defaultdict(list)
    computes: dict[str, list[float]] = defaultdict(list)
    for span in ledger.spans:
        if span.visit is not None and span.visit.stage == index:
            if span.kind == "load":
                loads[span.label].append(span.seconds)
            elif span.kind == "execute":
                computes[span.label].append(span.seconds)
    sized = {s.name: s for s in stage.segments}
    read = sum(sized[n].streamed_nbytes * len(x) for n, x in loads.items() if n in sized)
    spent = sum(map(sum, loads.values()))
    speed = read / spent if spent > 0 and read else READ_SPEED
    return replace(
        stage,
        segments=tuple(
            replace(
                s,
                load_s=median(loads[s.name]) if loads[s.name] else s.streamed_nbytes / speed,
                execute_s=median(computes[s.name]) if computes[s.name] else s.execute_s,
            )
            for s in stage.segments
        ),
    )
