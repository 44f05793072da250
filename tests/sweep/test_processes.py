"""Processes of this machine: each task once, whatever dies, no more at a time than there is room for."""

import multiprocessing

import pytest

from blockstream.plugins import Needs
from blockstream.sweep.processes import Processes, ProcessOptions, room_for
from tests.support.sweeps import Chore


def ended(tmp_path, tasks, deaths=1, **options):
    scheduler = Processes(ProcessOptions(**options))
    return list(scheduler.run(Chore(tmp_path, deaths), iter(tasks), Needs(1)))


def test_every_task_ends_once_and_those_whose_process_died_are_done_by_another(tmp_path):
    found = ended(tmp_path, ["a", "die 1", "b", "die 2"], at_once=2)
    assert sorted(e.task for e in found) == ["a", "b", "die 1", "die 2"]
    assert all(e.result == e.task.upper() and e.lost is None for e in found)
    assert [(tmp_path / n).read_text() for n in ("a", "die 1", "b", "die 2")] == ["x", "xx", "x", "xx"]
    assert multiprocessing.active_children() == []


def test_a_task_that_always_kills_its_process_is_given_up(tmp_path):
    (found,) = ended(tmp_path, ["die"], deaths=99, at_once=1, retries=1)
    assert found.lost == "its process died (SIGKILL), 2 times in all"


def test_when_nobody_waits_for_more_no_process_goes_on(tmp_path):
    running = Processes(ProcessOptions(at_once=1)).run(Chore(tmp_path), iter("abc"), Needs(1))
    assert next(running).task == "a"
    running.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("threads", "nbytes", "room"),
    [(1, 1 << 20, 8), (3, 1 << 20, 2), (1, 30 << 20, 3), (1, None, 1), (9, 1, 1)],
)
def test_room_is_what_processors_and_memory_have(monkeypatch, threads, nbytes, room):
    from types import SimpleNamespace

    monkeypatch.setattr("blockstream.sweep.processes.cpu_count", lambda: SimpleNamespace(threads=8))
    monkeypatch.setattr("blockstream.sweep.processes.headroom", lambda: SimpleNamespace(nbytes=100 << 20))
    assert room_for(Needs(threads, nbytes)) == room
