"""What a device did when is in the ledger: its lane without a gap, the link's with every byte."""

from __future__ import annotations

import io
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from blockstream.device.fake import FakeDevice
from blockstream.device.track import DeviceTrack
from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.plan.segments import Segment, Stage, Visit
from blockstream.report.facts import memory_facts
from blockstream.report.progress import Progress
from blockstream.report.record import read_run
from blockstream.report.summary import print_run
from blockstream.report.timeline import draw_timeline
from blockstream.report.trace import trace_events
from blockstream.run import runner
from tests.support.fake_cuda import fake_cuda
from tests.support.toy_pipeline import ToyPipeline, config, save


@pytest.mark.parametrize("copies", ["late", "early"])
def test_visits_of_a_device_follow_one_another_and_copies_have_their_bytes(copies):
    device, ledger = FakeDevice(copies=copies), Ledger()
    track = DeviceTrack(device, ledger)
    for n in range(3):
        visit, begin = Visit(0, 0, n), device.stamp("copies")
        device.copy([(device.empty(8), torch.zeros(8, dtype=torch.uint8))])
        track.copied(begin, f"s.{n}", visit, 8)
        if n != 1:  # nothing was bound for it: it goes on from the last
            track.begun()
        track.executed(Span("compute", "execute", 0.0, 0.0, f"s.{n}", visit))
    device.synchronise()
    track.resolve()
    lanes = {lane: [s for s in ledger.spans if s.thread == lane] for lane in ("link", "device")}
    assert [(s.kind, s.label, s.nbytes) for s in lanes["link"]] == [("copy", f"s.{n}", 8) for n in range(3)]
    assert [s.label for s in lanes["device"] if s.kind == "compute"] == ["s.0", "s.1", "s.2"]
    assert all(a.end_s == b.start_s for a, b in pairwise(lanes["device"]))


def test_what_is_not_over_is_written_down_later():
    device, ledger = FakeDevice(copies="late"), Ledger()
    track = DeviceTrack(device, ledger)
    begin = device.stamp("copies")
    track.copied(begin, "s", Visit(0, 0, 0), 8)
    track.resolve()
    assert len(ledger.spans) == 0
    device.synchronise()
    track.resolve()
    assert [s.kind for s in ledger.spans] == ["copy"]


def test_a_run_on_a_device_has_its_seconds_and_bytes_in_the_report(tmp_path, monkeypatch):
    fake_cuda(monkeypatch)
    asked = config(ToyPipeline(save(tmp_path / "toy")), device="cuda", device_budget="256MiB", arena="auto")
    report = runner.run(asked, tmp_path / "out")
    stages = report["stages"]
    # What was read ahead, and is copied to the end afterwards, is in no stage's account.
    assert 0 < sum(s["copied_nbytes"] for s in stages) <= report["device"]["copied_nbytes"]
    assert all(s["copy_s"] > 0 and s["execute_s"] > 0 and s["predicted"]["copy_s"] > 0 for s in stages)
    assert {s["name"]: s["passes"] for s in stages} == {"text": 1, "net": 3}
    assert report["device"]["budget"]["by_cause"]["weights"] > 0
    record = read_run(tmp_path / "out")
    assert {"load", "copy", "compute", "wait"} <= {b.kind for b in record.bars}
    lanes = {e["args"]["name"] for e in trace_events(record)["traceEvents"] if e["name"] == "thread_name"}
    assert {"compute", "loader", "link", "device"} <= lanes
    figure = draw_timeline(record)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["load", "copy", "execute"]
    print_run(report, Console(file=(shown := io.StringIO()), width=200))
    assert "copied at" in shown.getvalue() and "of a budget of 256 MiB" in shown.getvalue()
    assert any("held on the device at most" in str(fact) for fact in memory_facts(record))


def test_the_progress_line_has_both_budgets(monkeypatch):
    device = fake_cuda(monkeypatch)
    held = device.empty(3 << 20)
    run = SimpleNamespace(budget_nbytes=1 << 30, device=device, device_budget_nbytes=1 << 24)
    times = iter(range(0, 100, 5))
    progress = Progress(Console(file=io.StringIO()), clock=lambda: next(times), held_nbytes=lambda: 1 << 20)
    progress.run_started(run)
    progress.stage_started(Stage("s", (Segment("s.0", 1),)))
    assert progress.text().endswith("1.0 MiB of 1.0 GiB  on the device 3.0 MiB of 16 MiB")
    assert len(held) == 3 << 20
