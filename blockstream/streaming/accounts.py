"""Sum a session's ledger and stores up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockstream.engine.ledger import Ledger
from blockstream.report.stages import stage_summaries

from .declared import Declared
from .stage_facts import Facts
from .top_tier import TopTier

SCHEMA = 1


def session_report(
    tier: TopTier,
    stages: Sequence[Declared],
    facts: Mapping[str, Facts],
    ledger: Ledger,
    budget: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what has run so far: arena, stages, bytes read, moved, converted and gathered."""
    device = tier.device_report()  # first: it writes down what the device has done
    totals, reader = tier.files.totals, tier.files.reader
    accounts = [
        {
            **summary,
            "files": sorted({str(f.path) for x in stage.prepared.layouts.values() for f in x.files}),
            "costs": facts[stage.name].known.source,
            "gathered_nbytes": stage.prepared.gathered_nbytes,
            **({} if (shelf := stage.prepared.shelf) is None else {"experts": shelf.report()}),
            "synthetic": stage.prepared.synthetic is not None,
            "unused_tensors": len(stage.prepared.matched.unused),
        }
        for stage, summary in zip(stages, stage_summaries(tier.engine.plan, ledger.spans.totals), strict=True)
    ]
    return {
        "schema": SCHEMA,
        "budget": budget,
        "arena": {"nbytes": tier.engine.plan.arena_nbytes, "touched_nbytes": tier.arena.peak_touched_nbytes},
        "stages": accounts,
        "unplanned": tier.engine.unplanned,
        "read": reader.mode,
        "requests": {"threads": reader.threads, "nbytes": reader.request_nbytes},
        **({} if device is None else {"device": device}),
        "moved_nbytes": totals.moved_nbytes,
        "converted_nbytes": totals.converted_nbytes,
    }
