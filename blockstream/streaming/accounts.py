"""Sum a session's ledger and stores up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockstream.report.stages import stage_summaries

if TYPE_CHECKING:
    from .session import Session

SCHEMA = 1


def session_report(session: Session) -> dict[str, Any]:
    """Return what has run so far: arena, stages, bytes read, moved, converted and gathered."""
    engine, arena = session._engine, session._arena
    if engine is None or arena is None:
        return {"schema": SCHEMA, "budget": session.budget_report(), "stages": []}
    totals = session._files.totals
    stages = [
        {
            **summary,
            "files": sorted({str(f.path) for x in stage.prepared.layouts.values() for f in x.files}),
            "costs": stage.known.source,
            "gathered_nbytes": stage.prepared.gathered_nbytes,
            "synthetic": stage.prepared.synthetic is not None,
            "unused_tensors": len(stage.prepared.matched.unused),
        }
        for stage, summary in zip(
            session._stages, stage_summaries(engine.plan, session.ledger.spans), strict=True
        )
    ]
    return {
        "schema": SCHEMA,
        "budget": session.budget_report(),
        "arena": {"nbytes": engine.plan.arena_nbytes, "touched_nbytes": arena.peak_touched_nbytes},
        "stages": stages,
        "unplanned": engine.unplanned,
        "read": session._files.reader.mode,
        "requests": {
            "threads": session._files.reader.threads,
            "nbytes": session._files.reader.request_nbytes,
        },
        **({} if (device := session.device_report()) is None else {"device": device}),
        "moved_nbytes": totals.moved_nbytes,
        "converted_nbytes": totals.converted_nbytes,
    }
