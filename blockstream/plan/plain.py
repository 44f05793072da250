"""A plan as plain values: what the ledger keeps of it, so that a report needs nothing else."""

from __future__ import annotations

from typing import Any

from blockstream.plan.planner import Plan
from blockstream.plan.segments import AtMost, Exactly, Passes, Stage, Unknown
from blockstream.plan.simulate import StagePrediction

_KINDS: dict[str, type[Passes]] = {"exactly": Exactly, "at most": AtMost, "unknown": Unknown}


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return what a plan holds and predicts, stage by stage, in seconds and bytes."""
    return {
        "arena_nbytes": plan.arena_nbytes,
        "lookahead": plan.lookahead,
        "predicted_s": plan.predicted.wall_s,
        "stages": [
            {
                "name": stage.name,
                "passes": stage.passes.expected,
                "passes_are": passes_are(stage.passes),
                "policy": planned.policy,
                "slots": planned.slots,
                "order": list(stage.order),
                "segments": [
                    [s.name, s.nbytes, s.streamed_nbytes, s.load_s, s.execute_s, s.resident]
                    for s in stage.segments
                ],
                "retained": sorted(planned.retained),
                "predicted": prediction_record(predicted),
            }
            for stage, planned, predicted in zip(
                plan.schedule.stages, plan.stages, plan.predicted.stages, strict=True
            )
        ],
    }


def prediction_record(predicted: StagePrediction) -> dict[str, Any]:
    """Return the numbers of a stage's prediction."""
    return {
        "wall_s": predicted.wall_s,
        "execute_s": predicted.execute_s,
        "load_s": predicted.load_s,
        "stall_s": predicted.stall_s,
        "read_nbytes": predicted.read_nbytes,
        **(
            {"copy_s": predicted.copy_s, "copied_nbytes": predicted.copied_nbytes}
            if predicted.copied_nbytes
            else {}
        ),
    }


def passes_are(passes: Passes) -> str:
    """Return how well a number of passes is known: "exactly", "at most" or "unknown"."""
    return next(word for word, kind in _KINDS.items() if isinstance(passes, kind))


def why_retained(stage: Stage, index: int, policy: str, everything: bool) -> str | None:
    """Return why a segment stays, in words."""
    if stage.segments[index].resident:
        return "outside the blocks, used all through a pass"
    if everything:
        return "everything fits"
    return {"prefix": "among the first (Eq. 9)", "spread": "evenly spaced in compute time"}.get(
        policy, f"chosen by policy {policy}"
    )
