"""The ledger accounts for every second of the compute thread, on disk too, whatever ends the run."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstream.engine.engine import Engine
from blockstream.engine.ledger import FLUSH_S, KINDS, Ledger, read_records, unaccounted
from blockstream.engine.spans import Span, Spans
from blockstream.plan.planner import make_plan
from blockstream.plan.retention import NONE, SPREAD
from blockstream.plan.segments import AtMost, Visit
from tests.support.examples import examples
from tests.support.fakes import UNIT, FakeStore, VirtualClock, schedule, stage
from tests.support.strategies import plans


@st.composite
def spans(draw):
    """Any span: with and without a visit, of few threads and labels."""
    start_s, size = draw(st.floats(0, 1e6)), st.integers(0, 2**31 - 1)
    return Span(
        draw(st.sampled_from(["compute", "loader"])),
        draw(st.sampled_from(KINDS)),
        start_s,
        start_s + draw(st.floats(0, 1e3)),
        draw(st.sampled_from(["", "Zürich \N{SNOWMAN}", "dit.block.0"])),
        draw(st.none() | st.builds(Visit, size, size, size)),
        draw(st.integers(0, 2**62)),
    )


class Clock:
    """Seconds that a test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(plan, outside_s=0.0):
    """Run a plan on fake stores in virtual time; return its spans and the wall time beside the ledger."""
    clock = VirtualClock()
    seconds = {s.name: s for x in plan.schedule.stages for s in x.segments}
    begin = clock.now()
    with Engine(plan, FakeStore(lambda name: clock.sleep(seconds[name].load_s)), clock=clock) as engine:
        for visit in plan.schedule.visits():
            name = plan.schedule.segment(visit).name
            with engine.visit(plan.schedule.stages[visit.stage].name, name):
                clock.sleep(seconds[name].execute_s)
            if outside_s:
                clock.sleep(outside_s)
    return list(engine.ledger.spans), clock.now() - begin


# -- the compute thread's time -----------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run():
    one, two = stage("t5", load=3.0, execute=1.0), stage("dit", load=1.0, execute=2.0, passes=AtMost(3))
    return run(make_plan(schedule(one, two), 3 * UNIT, [SPREAD]), outside_s=0.25)


def test_the_spans_tile_the_compute_threads_time(a_run):
    spans, wall_s = a_run
    assert unaccounted(spans, wall_s) <= 0.01
    assert {s.kind for s in spans if s.thread == "compute"} == {"execute", "stall", "outside"}


def test_a_run_with_any_one_span_missing_does_not_pass(a_run):
    spans, wall_s = a_run
    lasting = [s for s in spans if s.thread == "compute" and s.seconds > 0]
    assert len(lasting) > 30
    for missing in lasting:
        assert unaccounted([s for s in spans if s is not missing], wall_s) > 0.001
    longest = max(lasting, key=lambda s: s.seconds)
    assert unaccounted([s for s in spans if s is not longest], wall_s) > 0.01


def test_each_kind_of_span_missing_is_noticed(a_run):
    spans, wall_s = a_run
    for kind in ("execute", "stall", "outside"):
        assert unaccounted([s for s in spans if s.kind != kind], wall_s) > 0.05, kind


@given(plans())
@examples(30)
def test_each_span_of_a_thread_begins_where_the_one_before_ended(plan):
    spans, wall_s = run(plan)
    for thread in ("compute", "loader"):
        mine = [s for s in spans if s.thread == thread]
        assert [s.start_s for s in mine] == [0.0, *(s.end_s for s in mine[:-1])]
        assert mine[-1].end_s == wall_s


def test_spans_that_overlap_count_once():
    spans = [Span("compute", "execute", 0, 4), Span("compute", "stall", 2, 5), Span("loader", "load", 5, 10)]
    assert unaccounted(spans, 10) == 0.5
    assert unaccounted(spans, 10, "loader") == 0.5
    assert unaccounted([], 10) == 1.0
    assert unaccounted([], 0) == 0.0


def test_time_outside_segments_is_named_by_its_phase():
    clock = Clock()
    ledger = Ledger(clock=clock)
    with ledger.phase("setup"):
        clock.now += 1
        with ledger.phase("tokenize"):
            clock.now += 2
        clock.now += 3
    clock.now += 4
    ledger.compute.mark("outside")
    named = [(s.label, s.seconds) for s in ledger.spans if s.seconds]
    assert named == [("setup", 1), ("tokenize", 2), ("setup", 3), ("", 4)]


# -- in memory ---------------------------------------------------------------------------------


@given(st.lists(spans()))
def test_spans_read_back_as_they_were_added(added):
    kept = Spans()
    for span in added:
        kept.append(span)
    assert list(kept) == kept[:] == [kept[i] for i in range(len(added))] == added
    assert kept[-3:] == added[-3:] and kept[::2] == added[::2] and len(kept) == len(added)
    with pytest.raises(IndexError):
        kept[len(added)]


def test_spans_may_be_added_while_they_are_read():
    kept, threads = Spans(), range(4)

    def add(n):
        for k in range(3000):
            kept.append(Span(f"thread {n}", "load", k, k + 1, str(k % 7), Visit(n, k, 0), k))

    adding = [threading.Thread(target=add, args=(n,)) for n in threads]
    for thread in adding:
        thread.start()
    while any(thread.is_alive() for thread in adding):
        assert all(s.label == str(s.nbytes % 7) and s.thread == f"thread {s.visit.stage}" for s in kept)
    for n in threads:
        assert [s.nbytes for s in kept if s.visit.stage == n] == list(range(3000))


# -- on disk -----------------------------------------------------------------------------------

SOME = [
    Span("compute", "outside", 0.0, 0.5, "setup"),
    Span("loader", "load", 0.0, 1.25, "dit.block.0", Visit(1, 0, 0), 1 << 33),
    Span("compute", "execute", 1.25, 2.0, "Zürich \u2028 \N{SNOWMAN}", Visit(1, 2, 27)),
]


def written(path, spans):
    with Ledger(path) as ledger:
        for span in spans:
            ledger.add(span)
    return path


def test_a_ledger_reads_back_as_it_was_written(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for span in SOME:
            ledger.add(span)
        ledger.note("memory", {"nbytes": 5})
    found = read_records(tmp_path / "ledger.jsonl")
    assert found.spans == SOME == read_records(tmp_path / "ledger.jsonl").spans
    assert [(n.kind, n.value) for n in found.notes] == [("memory", {"nbytes": 5})]
    assert found.began > 0


@pytest.mark.slow
def test_ten_thousand_visits_take_less_than_ten_megabytes(tmp_path):
    names = stage("transformer.spatial_blocks", sizes=(1,) * 28, passes=358)
    plan = make_plan(schedule(names), 2 * UNIT, [NONE])
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger, Engine(plan, FakeStore(), ledger) as engine:
        for visit in plan.schedule.visits():
            with engine.visit(names.name, plan.schedule.segment(visit).name):
                pass
    kept = list(ledger.all_spans())
    assert sum(s.kind == "execute" for s in kept) == 28 * 358 > 10_000
    assert path.stat().st_size < 10_000_000
    found = read_records(path).spans
    assert [(s.thread, s.kind, s.label, s.visit, s.nbytes) for s in found] == [
        (s.thread, s.kind, s.label, s.visit, s.nbytes) for s in kept
    ]
    assert all(abs(a.end_s - b.end_s) < 1e-6 for a, b in zip(found, kept, strict=True))


def test_a_killed_run_leaves_all_but_its_last_seconds(tmp_path):
    clock = Clock()
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, clock) as ledger:
        track = ledger.track("compute")
        for _ in range(100):
            clock.now += FLUSH_S / 10
            track.mark("execute")
        left = read_records(path).spans  # nothing was flushed or closed
        assert left == [
            s._replace(start_s=round(s.start_s, 7), end_s=round(s.end_s, 7))
            for s in ledger.spans[: len(left)]
        ]
        assert ledger.now() - left[-1].end_s <= FLUSH_S


@pytest.mark.parametrize("lost", [1, 2, 10, 40])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, lost):
    path = written(tmp_path / "ledger.jsonl", SOME)
    path.write_bytes(path.read_bytes()[:-lost])
    assert read_records(path).spans == SOME[:2]


NO_SPANS = [
    "",
    "{",
    "null",
    "7",
    "[1, 2]",
    '["a", "b", "x", 1, "", null, 0]',
    '["a", "b", 0, 1, "s", [1], 0]',
]


@pytest.mark.parametrize("broken", [*NO_SPANS, '{"note": "memory"}'])
def test_a_broken_line_is_named(tmp_path, broken):
    path = written(tmp_path / "ledger.jsonl", SOME)
    lines = path.read_text().splitlines()
    lines[2] = broken
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line 3: neither a span nor a note"):
        read_records(path)


@pytest.mark.parametrize("content", [b"", b"no end", b"[]\n", b'{"schema": 99}\n', b"hello\n", b"\xff\xfe\n"])
def test_what_is_no_ledger_is_refused(tmp_path, content):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a ledger"):
        read_records(path)


def test_spans_added_and_flushed_by_several_threads_are_written_once_each(tmp_path):
    path = tmp_path / "ledger.jsonl"
    begin = threading.Barrier(4)

    def work(n):
        begin.wait(5)
        for k in range(300):
            ledger.add(Span(f"t{n}", "load", k, k + 1))
            if k % 7 == 0:
                ledger.flush()

    with Ledger(path) as ledger:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    found = read_records(path).spans
    for n in range(4):
        assert [s.start_s for s in found if s.thread == f"t{n}"] == list(range(300))


def test_closing_twice_and_adding_after_are_harmless(tmp_path):
    path = written(tmp_path / "ledger.jsonl", SOME)
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    ledger.add(Span("compute", "outside", 0, 2 * FLUSH_S))
    ledger.flush()
    assert len(path.read_text().splitlines()) == 1
    assert json.loads(path.read_text())["schema"] == 1


# -- bounded -----------------------------------------------------------------------------------


def passes(ledger, count, clock):
    """Run passes of two stages in turn: three visits each, something outside after every one."""
    for n in range(count):
        for k in range(3):
            clock.now += 0.25
            ledger.compute.mark("execute", f"block.{k}", Visit(n % 2, n // 2, k))
            clock.now += 0.125
            ledger.compute.mark("outside", "between")
        ledger.note("step", {"run": n})


class Hand:
    """A clock set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_memory_holds_the_last_spans_of_each_stage_and_the_totals_of_all(tmp_path):
    clock = Hand()
    with Ledger(tmp_path / "ledger.jsonl", clock, most_spans=100, most_notes=10) as ledger:
        passes(ledger, 1000, clock)
        assert len(ledger.spans) < 100 and len(ledger.notes) == 10
        for stage_index in (0, 1, None):  # the last of each are there still
            last = [s for s in ledger.spans if (s.visit.stage if s.visit else None) == stage_index]
            assert len(last) >= 16 and last[-1].end_s > clock.now - 2
        told = {(t.kind, t.label, t.stage): t for t in ledger.spans.totals}
        total = told["execute", "block.1", 1]
        assert (total.number, total.seconds, total.passes) == (500, 125.0, 500)
        assert told["outside", "between", None].number == 3000
        # The whole is still tiled, and what is not in memory is read from the file.
        assert ledger.unaccounted(clock.now) == 0.0 and ledger.unaccounted(2 * clock.now) == 0.5
        spans = list(ledger.all_spans())
        assert len(spans) == 6000 and unaccounted(spans, clock.now) == 0.0
        assert [n.value["run"] for n in ledger.all_notes()] == list(range(1000))
    assert read_records(tmp_path / "ledger.jsonl").spans == spans


def test_without_a_file_what_was_dropped_is_in_the_totals_alone():
    clock = Hand()
    ledger = Ledger(clock=clock, most_spans=100)
    passes(ledger, 100, clock)
    assert list(ledger.all_spans()) == list(ledger.spans) and ledger.spans.dropped > 400
    assert sum(t.number for t in ledger.spans.totals) == 600 == len(ledger.spans) + ledger.spans.dropped
    assert ledger.unaccounted(clock.now) == 0.0
