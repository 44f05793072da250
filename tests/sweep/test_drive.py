"""A sweep makes each prompt once, whatever dies, and goes on where it was stopped."""

import json
import uuid

import pytest

from blockstream.errors import ConfigError
from blockstream.plugins import Ended
from blockstream.sweep.results import Results, Totals
from blockstream.sweep.work import scratch
from blockstream.system.atomic import locked
from tests.support.sweeps import InTurn

PROMPTS = ["a star", "a circle", "a square"]


def lines_at(place):
    return [json.loads(t) for n in place.names("results") for t in place.read(f"results/{n}").splitlines()]


@pytest.fixture(params=["folder", "memory"])
def where(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "out" if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


def test_each_prompt_is_made_once_though_what_made_it_died_before_it_could_tell(sweep_of, where):
    sweep, scheduler = sweep_of(PROMPTS, where), InTurn(deaths=1)
    report = sweep.run(scheduler)
    assert (report["runs"], report["done"], report["failed"], report["left"]) == (3, 3, 0, 0)
    lines = lines_at(sweep.place)
    assert [line["prompts"] for line in lines] == [[p] for p in PROMPTS]
    for line in lines:
        (name,) = line["files"]
        assert sweep.place.read(name).decode() == f"{line['prompts'][0]} in red"
        made = sweep.place.read(f"{line['run']}/files.jsonl").decode().count('"made":"0.txt"')
        assert (made, line["parts"], line["where"]) == (1, 1, "here")
    assert json.loads(sweep.place.read("report.json")) == report
    assert not list(scratch(str(where)).glob("runs/*/*"))


def test_the_same_sweep_again_makes_what_is_left_and_no_more(sweep_of, where):
    class Stops(InTurn):
        def run(self, perform, tasks, needs):
            yield next(super().run(perform, tasks, needs))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_of(PROMPTS, where).run(Stops())
    again = InTurn()
    report = sweep_of(PROMPTS, where).run(again)
    assert [name[-1] for name in again.performed] == ["1", "2"]
    assert (report["done"], report["prompts_done"]) == (3, 3)
    whole = InTurn()
    assert sweep_of(PROMPTS, where).run(whole)["done"] == 3 and whole.performed == []


def test_a_failed_run_is_told_and_tried_again_the_next_time(sweep_of, tmp_path):
    report = sweep_of(PROMPTS, tmp_path / "out", fail="circle").run(InTurn())
    assert (report["done"], report["failed"]) == (2, 1)
    (failure,) = report["failures"]
    assert failure["run"] == "runs/0000/0000001" and "cannot paint a circle" in failure["error"]
    again = InTurn()
    report = sweep_of(PROMPTS, tmp_path / "out", fail="circle").run(again)
    assert (again.performed, report["failed"]) == (["runs/0000/0000001"], 1)


def test_a_run_that_its_scheduler_gave_up_has_failed(sweep_of, tmp_path):
    class GivesUp:
        def run(self, perform, tasks, needs):
            for task in tasks:
                yield Ended(task, lost="its node died, 21 times")

    report = sweep_of(["a star"], tmp_path / "out").run(GivesUp())
    assert report["failures"] == [{"run": "runs/0000/0000000", "error": "its node died, 21 times"}]


def test_a_sweep_that_only_fails_ends_early(sweep_of, tmp_path, monkeypatch):
    monkeypatch.setattr("blockstream.sweep.drive.FIRST", 2)
    scheduler = InTurn()
    with pytest.raises(ConfigError, match=r"the first 2 runs have all failed.*cannot paint"):
        sweep_of([f"a star {n}" for n in range(9)], tmp_path / "out", fail="star").run(scheduler)
    assert len(scheduler.performed) == 2


def test_a_grid_and_a_batch_have_folders_of_their_own(sweep_of, tmp_path):
    cells = [{"colour": "red"}, {"colour": "blue"}]
    sweep = sweep_of(PROMPTS, tmp_path / "out", cells, batch=2)
    report = sweep.run(InTurn())
    assert (report["runs"], report["prompts"], report["prompts_done"]) == (4, 6, 6)
    found = {p.read_text() for p in (tmp_path / "out").rglob("?.txt")}
    assert found == {f"{prompt} in {c['colour']}" for prompt in PROMPTS for c in cells}
    assert (tmp_path / "out/runs/cell-001/0000/0000002/0.txt").read_text() == "a square in blue"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": ["another"]}, "other prompts"),
        ({"batch": 2}, "other batch: 1, not 2"),
        ({"cells": [{"colour": "blue"}]}, "other grid"),
        ({"colour": "blue"}, "colour was 'red' and is 'blue'"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(sweep_of, tmp_path, change, said):
    sweep_of(["a star"], tmp_path / "out").run(InTurn())
    given = {"prompts": ["a star"], **change}
    with pytest.raises(ConfigError, match=said):
        sweep_of(given.pop("prompts"), tmp_path / "out", **given)


def test_a_budget_may_change_and_is_what_a_run_needs(sweep_of, tmp_path):
    scheduler = InTurn()
    sweep_of(["a star"], tmp_path / "out").run(scheduler)
    assert (scheduler.needs.threads, scheduler.needs.nbytes) == (1, None)
    sweep_of(["a star"], tmp_path / "out", budget="3.3GiB").run(scheduler)
    assert scheduler.needs.nbytes == int(3.3 * 2**30)


def test_a_folder_is_one_sweeps_at_a_time(sweep_of, tmp_path):
    sweep = sweep_of(["a star"], tmp_path)
    with locked(tmp_path), pytest.raises(ConfigError, match="being written"):
        sweep.run(InTurn())


def test_a_pipeline_without_prompts_and_a_wrong_config_are_refused(sweep_of, tmp_path):
    with pytest.raises(ConfigError, match="colour"):
        sweep_of(["a star"], tmp_path, colour=3)
    with pytest.raises(ConfigError, match="unknown key"):
        sweep_of(["a star"], tmp_path, [{"colur": "red"}])


def test_lines_are_written_in_parts_when_many_or_old(sweep_of, tmp_path, monkeypatch):
    now = [0.0]
    place = sweep_of(["a star"], tmp_path / "out").place
    results = Results(place, clock=lambda: now[0])
    monkeypatch.setattr("blockstream.sweep.results.PART_LINES", 3)
    for n in range(4):
        results.add({"run": str(n)})
    assert [line["run"] for line in results.read()] == ["0", "1", "2"]
    now[0] = 31.0
    results.add({"run": "4"})
    assert len(list(results.read())) == 5
    name = f"results/{place.names('results')[-1]}"
    place.write(name, place.read(name)[:-4])  # cut by a power cut
    assert [line["run"] for line in Results(place).read()] == ["0", "1", "2", "3"]


def test_a_run_counts_once_and_as_done_once_it_is_done():
    totals = Totals(2, 2)
    line = {"run": "a", "prompts": ["x"], "read_nbytes": 5}
    assert totals.add({**line, "error": "broke"}) and totals.add(line)
    assert not totals.add(line) and not totals.add({**line, "error": "broke"})
    found = totals.account()
    assert (found["done"], found["failed"], found["left"], found["read_nbytes"]) == (1, 0, 1, 5)
