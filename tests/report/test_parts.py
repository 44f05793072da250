"""However long a run was, few bars of it are held, and drawing it takes what it takes of a short one."""

import json
import subprocess
import sys

import pytest

from blockstream.engine.ledger import Ledger, read_records
from blockstream.engine.spans import Span
from blockstream.plan.segments import Visit
from blockstream.report.parts import HEAD, MOST_BARS
from blockstream.report.passes import pass_rows
from blockstream.report.record import read_run

PASSES, SEGMENTS = 600, 40


def write(folder, passes=PASSES):
    """Write the ledger of passes that load and execute each segment in turn, a second each pass."""
    now = [0.0]
    ledger = Ledger(folder / "ledger.jsonl", clock=lambda: now[0])
    for p in range(passes):
        for s in range(SEGMENTS):
            start, end = now[0], p + (s + 1) / SEGMENTS
            for thread, kind in (("loader", "load"), ("compute", "execute")):
                ledger.add(Span(thread, kind, start, end, f"block.{s}", Visit(0, p, s), 1000))
            now[0] = end
    ledger.close()
    return folder


@pytest.fixture(name="long", scope="module")
def _long(tmp_path_factory):
    return write(tmp_path_factory.mktemp("long"))


def test_a_long_run_is_held_as_few_bars_that_cover_the_same_time(long):
    record = read_run(long)
    assert 2 * PASSES * SEGMENTS > 2 * MOST_BARS
    assert len(record.bars) < MOST_BARS
    assert record.wall_s == pytest.approx(PASSES)
    for kind in ("load", "execute"):
        assert sum(b.seconds for b in record.bars if b.kind == kind) == pytest.approx(PASSES, rel=1e-3)
        assert sum(b.nbytes for b in record.bars if b.kind == kind) == PASSES * SEGMENTS * 1000
    assert record.executed == {"stage 0": pytest.approx(PASSES)}
    assert any("of 48,000 spans" in r for r in record.remarks)


def test_the_first_passes_and_the_last_stay_as_they_were(long):
    record = read_run(long)
    rows = pass_rows(record)
    assert [r.pass_index for r in rows] == [*range(HEAD), PASSES - 1]
    assert all(r.execute_s == pytest.approx(1.0) and r.nbytes == SEGMENTS * 1000 for r in rows)


def test_a_short_run_keeps_every_bar(tmp_path):
    record = read_run(write(tmp_path, 5))
    assert len(record.bars) == 2 * 5 * SEGMENTS
    assert len(pass_rows(record)) == 5


DRAW = """
import sys, threading
from pathlib import Path
from blockstream.run.drawing import DRAWING_NBYTES
from blockstream.report.write import draw
from blockstream.system.memory import MemoryWatch, held
before = held().nbytes
with MemoryWatch() as watch:
    draw(Path(sys.argv[1]))
print(watch.peak_nbytes - before, DRAWING_NBYTES)
"""


def test_drawing_a_long_run_takes_what_is_reserved_for_it(long):
    done = subprocess.run([sys.executable, "-c", DRAW, str(long)], capture_output=True, text=True, check=True)
    took, reserved = map(int, done.stdout.split())
    assert 0 < took <= reserved
    trace = json.loads((long / "trace.json").read_text())["traceEvents"]
    assert len(trace) < MOST_BARS + 10


@pytest.mark.parametrize("tail", [b"", b"\0" * 5000, b'["loader","lo', b'["loader"]\n["x"]\n'])
def test_what_a_power_cut_left_at_the_end_is_left_out(tmp_path, tail):
    write(tmp_path, 2)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert len(read_records(path).spans) == 2 * 2 * SEGMENTS
    assert len(read_run(tmp_path).bars) == 2 * 2 * SEGMENTS


@pytest.mark.parametrize("text", [b"", b'{"sche', b"\0" * 100])
def test_a_part_that_was_killed_before_its_first_line_is_remarked(tmp_path, text):
    write(tmp_path, 2)
    (tmp_path / "ledger.1.jsonl").write_bytes(text)
    record = read_run(tmp_path)
    assert len(record.bars) == 2 * 2 * SEGMENTS
    assert any("ledger.1.jsonl was cut in its first line" in r for r in record.remarks)


def test_a_run_that_has_just_begun_is_a_run(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    record = read_run(tmp_path)
    assert (record.bars, record.finished) == ([], False)
    from blockstream.report.write import draw

    assert {p.name for p in draw(tmp_path)} == {"report.html", "timeline.png", "trace.json"}
    ledger.close()
