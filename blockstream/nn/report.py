"""Sum a session's ledger up, stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockstream.ledger import overlap

if TYPE_CHECKING:
    from .session import Session

SCHEMA = 1


def session_report(session: Session) -> dict[str, Any]:
    """Return what has run so far: arena, stages, bytes read, moved, converted and gathered."""
    engine, arena = session._engine, session._arena
    if engine is None or arena is None:
        return {"schema": SCHEMA, "stages": []}
    totals = session._files.totals
    stages = []
    for index, stage in enumerate(session._stages):
        spans = [s for s in session.ledger.spans if s.visit is not None and s.visit.stage == index]
        planned = engine.plan.stages[index]
        stages.append(
            {
                "name": stage.name,
                "passes": 1 + max((s.visit.pass_index for s in spans if s.visit), default=-1),
                "b": len(stage.streamed),
                "d": sum(i in planned.retained for i in stage.streamed),
                "policy": planned.policy,
                "slots": planned.slots,
                "overlap": overlap(spans),
                "stall_s": sum(s.seconds for s in spans if s.kind == "stall"),
                "execute_s": sum(s.seconds for s in spans if s.kind == "execute"),
                "load_s": sum(s.seconds for s in spans if s.kind == "load"),
                "read_nbytes": sum(s.nbytes for s in spans if s.kind == "load"),
                "gathered_nbytes": stage.prepared.gathered_nbytes,
                "unused_tensors": len(stage.prepared.matched.unused),
            }
        )
    return {
        "schema": SCHEMA,
        "arena": {"nbytes": engine.plan.arena_nbytes, "touched_nbytes": arena.peak_touched_nbytes},
        "stages": stages,
        "unplanned": engine.unplanned,
        "read": session._files.reader.mode,
        "moved_nbytes": totals.moved_nbytes,
        "converted_nbytes": totals.converted_nbytes,
    }
