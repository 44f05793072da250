"""timeline.png and trace.json: what they show, of whole runs and of parts."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest

from blockstream.report.bars import Bar, Sample
from blockstream.report.record import read_run
from blockstream.report.thin import thin_bars, thin_samples
from blockstream.report.timeline import draw_timeline, headline, timeline_png
from blockstream.report.trace import trace_events


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]


def test_the_picture_has_the_run_each_stage_and_memory(finished):
    figure = draw_timeline(read_run(finished))
    found = titles(figure)
    assert found[0] == "the whole run"
    assert [t.split()[0] for t in found[1:4]] == ["t5", "dit", "vae"]
    assert "22 of 57 segments retained" in found[2]
    assert found[4].startswith("memory")
    width, height = png_size(timeline_png(read_run(finished)))
    assert width > 1200 and height > 600


def test_a_stage_shows_its_first_passes_and_its_last(finished):
    figure = draw_timeline(read_run(finished))
    said = [t.get_text().strip() for ax in figure.axes for t in ax.texts]
    assert "pass 1" in said and "pass 6" in said and "pass 4" in said
    assert "pass 5" not in said


def test_blocks_are_numbered_where_there_is_room(finished):
    figure = draw_timeline(read_run(finished))
    said = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert {str(n) for n in range(24)} <= set(said)


@pytest.mark.parametrize("folder", ["killed", "older"])
def test_parts_of_runs_are_drawn(folder, request):
    png_size(timeline_png(read_run(request.getfixturevalue(folder))))


def test_a_run_without_a_span_is_drawn(copied):
    (copied / "ledger.jsonl").unlink()
    png_size(timeline_png(read_run(copied)))


def test_drawing_leaves_no_figure_to_pyplot_and_needs_no_display(finished):
    code = (
        "import sys; from pathlib import Path\n"
        "from blockstream.report.record import read_run\n"
        "from blockstream.report.timeline import timeline_png\n"
        "timeline_png(read_run(Path(sys.argv[1])))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(finished)], check=False).returncode == 0


def test_the_headline_tells_predicted_measured_and_peak(finished, killed):
    said = headline(read_run(finished))
    assert "predicted" in said and "of 3.2 GiB" in said
    assert headline(read_run(killed)).startswith("unfinished")


def test_the_trace_has_every_span_and_only_what_the_format_knows(finished):
    record = read_run(finished)
    trace = json.loads(json.dumps(trace_events(record), allow_nan=False))
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(record.bars)
    assert {e["ph"] for e in trace["traceEvents"]} == {"M", "X", "C", "i"}
    assert all(isinstance(e["ts"], int) and e["dur"] >= 0 for e in spans)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert {"compute", "loader", "blockstream finished"} == names
    load = next(e for e in spans if e["cat"] == "load")
    assert load["args"] == {"stage": "t5", "pass": 1, "retained": False, "bytes": 193 << 20}


def test_spans_of_a_thread_do_not_overlap_after_rounding(finished):
    spans = [e for e in trace_events(read_run(finished))["traceEvents"] if e["ph"] == "X"]
    for tid in {e["tid"] for e in spans}:
        at = 0
        for event in sorted((e for e in spans if e["tid"] == tid), key=lambda e: (e["ts"], e["dur"])):
            assert event["ts"] >= at
            at = event["ts"] + event["dur"]


def test_many_bars_become_few_and_cover_the_same_time():
    bars = [Bar("compute", "execute", k * 1.0, k + 0.999, f"b{k}", "dit", k, False, 3) for k in range(10_000)]
    few = thin_bars(bars, 200)
    assert len(few) <= 400
    assert (few[0].start_s, few[-1].end_s) == (0.0, bars[-1].end_s)
    assert sum(b.nbytes for b in few) == 30_000
    assert "of dit" in few[0].label
    assert thin_bars(bars, 10_000) == bars


def test_what_is_retained_is_not_merged_with_what_is_not():
    bars = [Bar("compute", "execute", k, k + 1, "b", "dit", 0, k % 2 == 0) for k in range(1000)]
    few = thin_bars(bars, 50)
    assert {b.retained for b in few} == {True, False}


def test_the_peak_survives_thinning():
    samples = [Sample(k * 0.01, 1000 + (k == 777) * 5000, 10) for k in range(5000)]
    few = thin_samples(samples, 100)
    assert len(few) <= 100
    assert max(s.nbytes for s in few) == 6000
    assert thin_samples(samples[:50], 100) == samples[:50]
