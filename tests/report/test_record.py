"""A run's folder is read back as far as it goes, and what is missing is said."""

from __future__ import annotations

import json

import pytest

from blockstream.engine.ledger import Ledger
from blockstream.errors import ConfigError
from blockstream.report.passes import pass_rows
from blockstream.report.record import read_run
from tests.support.runs import LABEL, write_ledger


def test_a_finished_run_has_its_stages_in_order_and_no_remarks(finished, plan):
    record = read_run(finished)
    assert list(record.stages) == ["t5", "dit", "vae"]
    assert (record.name, record.finished, record.remarks) == ("finished", True, [])
    visits = sum(len(s.order) * s.passes.expected for s in plan.schedule.stages)
    assert len([b for b in record.bars if b.kind == "execute"]) == visits
    assert record.budget_nbytes == 3300 << 20
    assert len(record.memory) == 400
    assert record.steps[0].leaps == ((5, 30),)


def test_bars_know_what_the_plan_retained(finished, plan):
    record = read_run(finished)
    stage = plan.schedule.stages[1]
    kept = {stage.segments[i].name for i in plan.stages[1].retained}
    for bar in record.of("dit", "execute"):
        assert bar.retained == (bar.label in kept)
    assert kept and len(kept) < len(stage.segments)


def test_a_new_plan_counts_from_when_it_was_made(tmp_path, plan):
    from blockstream.plan.plain import plan_record

    now = [0.0]
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=lambda: now[0])
    first, later = plan_record(plan), plan_record(plan)
    first["stages"][0]["retained"] = []
    later["stages"][0]["retained"] = [0]
    from blockstream.engine.spans import Span
    from blockstream.plan.segments import Visit

    ledger.note("plan", first)
    now[0] = 5.0
    ledger.note("plan", later)
    for at in (1.0, 6.0):
        ledger.add(Span("compute", "execute", at, at + 1, "encoder.block.0", Visit(0, 0, 0)))
    ledger.close()
    assert [b.retained for b in read_run(tmp_path).of("t5")] == [False, True]


def test_a_killed_run_is_read_up_to_its_last_whole_line(killed):
    record = read_run(killed)
    assert not record.finished
    assert 6.0 < record.wall_s <= 8.0
    assert list(record.stages) == ["t5", "dit", "vae"]
    assert record.budget_nbytes == 3300 << 20
    assert any("did not come to its end" in r for r in record.remarks)


def test_an_older_run_takes_its_stages_from_the_report(older):
    record = read_run(older)
    assert list(record.stages) == ["t5", "dit", "vae"]
    assert record.of("dit", "load") and not any(b.retained for b in record.bars)
    assert any("no plans" in r for r in record.remarks)


def test_an_older_killed_run_numbers_its_stages(older):
    (older / "report.json").unlink()
    assert list(read_run(older).stages) == ["stage 0", "stage 1", "stage 2"]


def test_the_parts_of_a_resumed_run_follow_one_another(killed, plan):
    (killed / "ledger.jsonl").rename(killed / "ledger.1.jsonl")
    write_ledger(killed / "ledger.jsonl", plan)
    record = read_run(killed)
    whole = read_run_alone(killed)
    assert any("resumed 1 times" in r for r in record.remarks)
    assert record.wall_s == pytest.approx(
        whole.wall_s + max(b.end_s for b in record.bars[: 10**9] if b.end_s <= 8)
    )
    rows = [(r.stage, r.pass_index) for r in pass_rows(record)]
    assert rows.count(("t5", 0)) == 2


def read_run_alone(folder):
    kept = folder / "ledger.1.jsonl"
    text = kept.read_text()
    kept.unlink()
    record = read_run(folder)
    kept.write_text(text)
    return record


def test_many_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    for n, name in enumerate(["ledger.1.jsonl", "ledger.2.jsonl", "ledger.10.jsonl", "ledger.jsonl"]):
        now = [0.0]
        ledger = Ledger(tmp_path / name, clock=lambda now=now: now[0])
        now[0] = 1.0
        ledger.compute.mark("outside", str(n))
        ledger.close()
    assert [(b.label, b.end_s) for b in read_run(tmp_path).bars] == [("0", 1), ("1", 2), ("2", 3), ("3", 4)]


@pytest.mark.parametrize(
    "line", ["nonsense", "[1, 2]", '{"note": "plan"}', '["a","b","x","y","",null,0]', "[" * 5000]
)
def test_a_broken_line_is_named_with_what_to_do(copied, line):
    text = (copied / "ledger.jsonl").read_text().splitlines()
    text[4] = line
    (copied / "ledger.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(ConfigError, match=r"ledger.jsonl, line 5: .*cut the file before that line"):
        read_run(copied)


def test_a_file_that_is_no_ledger_is_named(copied):
    (copied / "ledger.jsonl").write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(ConfigError, match="not a ledger"):
        read_run(copied)


def test_a_report_that_cannot_be_read_leaves_the_ledger(copied):
    (copied / "report.json").write_text("{")
    record = read_run(copied)
    assert record.bars and not record.finished
    assert any("report.json cannot be read" in r for r in record.remarks)


@pytest.mark.parametrize("report", ["[]", '"text"', '{"stages": 3}', '{"stages": [1, null], "budget": []}'])
def test_a_report_of_another_shape_is_no_error(copied, report):
    (copied / "report.json").write_text(report)
    assert read_run(copied).bars


def test_a_report_without_a_ledger_has_no_timeline(copied):
    (copied / "ledger.jsonl").unlink()
    record = read_run(copied)
    assert record.bars == [] and record.finished
    assert any("ledger is missing" in r for r in record.remarks)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path)


def test_results_outside_the_folder_are_not_shown(copied, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    report = json.loads((copied / "report.json").read_text())
    report["output"]["files"] = ["../secret.png", "/etc/passwd.png", "video.mp4", 7]
    (copied / "report.json").write_text(json.dumps(report))
    (copied / "video.mp4").write_bytes(b"x")
    (copied / "link.png").symlink_to(tmp_path / "secret.png")
    assert [p.name for p in read_run(copied).results] == ["video.mp4"]
    (copied / "report.json").unlink()
    assert [p.name for p in read_run(copied).results] == ["video.mp4"]


def test_each_pass_has_its_times_its_reads_and_its_step(finished, plan):
    rows = pass_rows(read_run(finished))
    assert [(r.stage, r.pass_index) for r in rows] == [
        ("t5", 0),
        *(("dit", p) for p in range(6)),
        *(("vae", p) for p in range(4)),
    ]
    predicted = plan.predicted.stages
    dit = [r for r in rows if r.stage == "dit"]
    assert sum(r.execute_s for r in dit) == pytest.approx(predicted[1].execute_s)
    assert sum(r.nbytes for r in dit) == predicted[1].read_nbytes
    assert [r.step for r in dit] == list(range(6))
    assert (dit[5].to, dit[0].cosine) == (30, None)
    assert rows[0].step is None


def test_labels_are_kept_as_they_are(finished):
    assert LABEL in {b.label for b in read_run(finished).bars}
