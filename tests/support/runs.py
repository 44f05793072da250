"""Folders of runs that never ran: a plan's predicted timeline, written as a ledger and a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Plan, make_plan
from blockstream.plan.retention import POLICIES
from blockstream.plan.segments import AtMost, Exactly, Schedule, Segment, Stage
from blockstream.plan.simulate import simulate
from blockstream.report.outcome import sampler_account, stage_accounts
from blockstream.report.stages import stage_summaries

MIB = 1 << 20
LABEL = 'text <script>alert("t5")</script>'


def full_size(arena_nbytes: int = 2000 * MIB, passes: int = 6) -> Plan:
    """Return a plan of three stages shaped like Open-Sora's, l near e in the second."""
    t5 = tuple(Segment(f"encoder.block.{i}", 193 * MIB, 0.16, 0.05) for i in range(24))
    dit = [Segment("rest", 60 * MIB, 0.05, 0.02, resident=True)]
    for i in range(28):
        dit.append(Segment(f"spatial_blocks.{i}", 81 * MIB, 0.067, 0.055 + 0.004 * (i % 3)))
        dit.append(Segment(f"temporal_blocks.{i}", 81 * MIB, 0.067, 0.048 + 0.004 * (i % 5)))
    vae = tuple(Segment(f"decoder.up_blocks.{i}", (20 + 14 * i) * MIB, 0.02 * (i + 1), 0.4) for i in range(6))
    stages = (
        Stage("t5", t5, passes=Exactly(1)),
        Stage("dit", tuple(dit), passes=AtMost(passes)),
        Stage("vae", vae, passes=Exactly(4)),
    )
    return make_plan(Schedule(stages), arena_nbytes, POLICIES)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write_ledger(path: Path, plan: Plan, notes: bool = True, upto_s: float = math.inf) -> Ledger:
    """Write the predicted timeline as a ledger; `upto_s` leaves out what would have come after a kill."""
    clock = Clock()
    ledger = Ledger(path, clock=clock)
    if notes:
        ledger.note("plan", plan_record(plan))
        ledger.note("budget", 3300 * MIB)
    at = 0.5
    ledger.add(Span("compute", "outside", 0.0, at, LABEL))
    end_s = at
    for event in sorted(simulate(plan), key=lambda e: e.start_s):
        start, stop = at + event.start_s, at + event.end_s
        segment = plan.schedule.segment(event.visit)
        if stop > upto_s:
            continue
        if event.kind == "load":
            span = Span("loader", "load", start, stop, segment.name, event.visit, segment.streamed_nbytes)
            ledger.add(span)
            continue
        if start > end_s:
            ledger.add(Span("compute", "stall", end_s, start, segment.name, event.visit))
        ledger.add(Span("compute", "execute", start, stop, segment.name, event.visit))
        end_s = stop
    if notes:
        _write_notes(ledger, clock, end_s, plan)
    clock.now = ledger.compute.at = end_s
    ledger.close()
    return ledger


def _write_notes(ledger: Ledger, clock: Clock, end_s: float, plan: Plan) -> None:
    for k in range(400):
        clock.now = end_s * k / 400
        held = 700 + 1400 * min(1, clock.now) + 300 * math.sin(k / 9) ** 2
        ledger.note("memory", [int(held * MIB), int(min(held - 500, plan.arena_nbytes / MIB) * MIB)])
    dits = [s for s in ledger.spans if s.visit and s.visit.stage == 1 and s.kind == "execute"]
    for p in sorted({s.visit.pass_index for s in dits}):
        clock.now = max(s.end_s for s in dits if s.visit.pass_index == p)
        last = p == 5
        ledger.note(
            "step",
            {
                "run": 0,
                "i": p,
                "to": 30 if last else p + 1,
                "of": 30,
                "t": 1 - p / 30,
                "cosine": None if p == 0 else 1 - 0.2 / (1 + p * p),
            },
        )


def write_run(folder: Path, plan: Plan | None = None, prompt: str = 'a <b>red</b> circle & "more"') -> Path:
    """Write a whole run: ledger, report and config."""
    plan = plan or full_size()
    folder.mkdir(parents=True)
    ledger = write_ledger(folder / "ledger.jsonl", plan)
    summaries = stage_summaries(plan, ledger.spans.totals)
    report = {
        "schema": 1,
        "budget": {
            "nbytes": 3300 * MIB,
            "peak_nbytes": 2400 * MIB,
            "held": True,
            "by_cause": {"arena": 1800 * MIB, "runtime": 320 * MIB, "other": 280 * MIB},
            "peak_at_s": 2.0,
            "peak_during": "computing encoder.block.9",
        },
        "stages": stage_accounts(summaries, plan),
        "sampler": sampler_account("lpl", ledger.notes),
        "attention": {
            "choices": ["tdtm"],
            "merged_layers": 168,
            "merged_passes": 3,
            "plain_passes": 3,
            "merged_pass_s": 2.1,
            "plain_pass_s": 3.4,
        },
        "disk": {"read_nbytes": 10**10, "read_bytes_per_s": 1.21e9, "disk_bytes_per_s": 1.4e9},
        "output": {"files": ["video.mp4"], "prompts": [prompt]},
        "wall_s": max(span.end_s for span in ledger.spans),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(f"pipeline: movd\nprompt: {json.dumps(prompt)}\nsteps: 30\n")
    return folder
