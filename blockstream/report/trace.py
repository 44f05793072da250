"""trace.json: the run as trace events, for Perfetto and chrome://tracing."""

from __future__ import annotations

from typing import Any

from .record import RunRecord

_PROCESS = 1
_THREADS = {"compute": 1, "loader": 2}


def trace_events(record: RunRecord) -> dict[str, Any]:
    """Return the run in the trace event format: spans, memory as counters, plans and steps as instants.

    Times are in microseconds from the beginning of the run.
    """
    threads = {
        name: _THREADS.get(name, 10 + k)
        for k, name in enumerate(dict.fromkeys(b.thread for b in record.bars))
    }
    events: list[dict[str, Any]] = [_named("process_name", 0, f"blockstream {record.name}")]
    events += [_named("thread_name", tid, name) for name, tid in threads.items()]
    for bar in record.bars:
        event: dict[str, Any] = {
            "ph": "X",
            "pid": _PROCESS,
            "tid": threads[bar.thread],
            "ts": _us(bar.start_s),
            "dur": _us(bar.end_s) - _us(bar.start_s),
            "name": bar.label or bar.kind,
            "cat": bar.kind,
        }
        if bar.stage:
            event["args"] = {"stage": bar.stage, "pass": bar.pass_index + 1, "retained": bar.retained}
            if bar.nbytes:
                event["args"]["bytes"] = bar.nbytes
        events.append(event)
    for sample in record.memory:
        other = max(0, sample.nbytes - sample.arena_nbytes)
        args = {"weights": sample.arena_nbytes, "other": other}
        events.append(
            {"ph": "C", "pid": _PROCESS, "ts": _us(sample.at_s), "name": "held bytes", "args": args}
        )
    events += [
        {
            "ph": "i",
            "s": "p",
            "pid": _PROCESS,
            "tid": 0,
            "ts": _us(n.at_s),
            "name": n.kind,
            "args": {"value": n.value},
        }
        for n in record.notes
        if n.kind in ("step", "merging")
    ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run": record.name, "versions": dict(record.report.get("versions") or {})},
    }


def _named(what: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": tid, "name": what, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
