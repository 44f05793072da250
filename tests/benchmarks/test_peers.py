"""The race of peers: its grid, how it goes on where it stopped, its table and figure, on made-up cells."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.peers import page
from benchmarks.peers.cells import (
    AUTO,
    MAIN,
    MODELS,
    OTHERS,
    REFERENCE,
    RIVAL,
    TRIALS,
    Cell,
    Results,
    best_other,
    main_column,
    other_columns,
    pairs,
    pass_s,
)
from benchmarks.peers.environments import NoRoomError, check_disk, environment
from benchmarks.peers.ways import WAYS

SECONDS = {REFERENCE: 2.0, AUTO: 2.5, RIVAL: 6.0, "safetensors mmap": 4.0}


def facts(way, seconds=None, **more):
    seconds = SECONDS.get(way, 9.0) if seconds is None else seconds
    return {
        "way": way,
        "passes_s": [seconds + 1, seconds, seconds - 1],
        "read_nbytes": [5 << 30, 1 << 30, 0],
        "raw_bytes_per_s": float(1 << 30),
        "setup_s": 0.5,
        "peak_nbytes": 3 << 30,
        "page_cache_nbytes": 1 << 20,
        "disk_nbytes": 0,
        "digest": "abc",
        "versions": {"torch": "2.13.0"},
        **more,
    }


@pytest.fixture
def found():
    cells = {cell: facts(cell.way) for cell in main_column()}
    return cells | {cell: facts(cell.way) for cell in other_columns(cells)}


def test_full_column_has_every_way_three_times_and_the_reference_once():
    cells = main_column()
    assert len(cells) == len(set(cells))
    for model in MODELS:
        rows = [(c.way, c.budget) for c in cells if c.model == model]
        assert {r: rows.count(r) for r in rows} == {
            **{(way, MAIN): TRIALS for way in WAYS if way != REFERENCE},
            (REFERENCE, "unlimited"): 1,
        }


def test_an_environment_is_made_once_for_the_cells_of_a_column(found):
    for cells in (main_column(), other_columns(found), other_columns(found, 1)):
        order = [WAYS[c.way].packages for c in cells]
        changes = [packages for n, packages in enumerate(order) if n == 0 or order[n - 1] != packages]
        assert len(changes) == len(set(changes))


def test_pairs_are_further_trials_of_ours_and_one_row_in_turn():
    rival = Cell("dit", "6GiB", "AirCanvas ring")
    ours = Cell("dit", "6GiB", AUTO)
    assert pairs({}, rival, 1) == [rival, ours]
    cells = pairs({rival: facts(rival.way), replace(ours, trial=2): facts(AUTO)}, rival, 2)
    assert [(c.way, c.trial) for c in cells] == [(AUTO, 3), (rival.way, 3), (rival.way, 4), (AUTO, 4)]
    assert {(c.model, c.budget) for c in cells} == {("dit", "6GiB")}


def test_other_budgets_have_ours_accelerate_and_the_fastest_other(found):
    found[Cell("dit", MAIN, "AirCanvas ring", 0)] = facts("AirCanvas ring", 1.0)  # one lucky trial of three
    cells = other_columns(found)
    for model in MODELS:
        expected = {(way, b) for way in (AUTO, RIVAL, "safetensors mmap") for b in OTHERS}
        assert {(c.way, c.budget) for c in cells if c.model == model} == expected


def test_further_trials_are_of_the_other_budgets_and_the_reference(found):
    again = {c.row for c in other_columns(found, 1)}
    assert again == {c.row for c in other_columns(found)} | {Cell(m, "unlimited", REFERENCE) for m in MODELS}
    assert {c.trial for c in other_columns(found, 1)} == {1}


def test_the_fastest_other_is_not_chosen_before_a_models_full_column_is_done():
    cells = {cell: facts(cell.way) for cell in main_column()}
    del cells[Cell("llama", MAIN, "AirLLM", 2)]
    ways = {(c.model, c.way) for c in other_columns(cells)}
    assert ("t5", "safetensors mmap") in ways
    assert ("llama", "safetensors mmap") not in ways


def test_where_no_other_could_run_there_is_no_best_one():
    cells = {c: {"way": c.way, "failed": "TypeError: no"} for c in main_column()}
    cells |= {c: facts(c.way) for c in cells if c.way in (AUTO, RIVAL)}
    assert best_other(cells, "t5") is None
    assert {c.way for c in other_columns(cells)} == {AUTO, RIVAL}


def test_what_is_done_is_not_run_again_after_an_interruption(tmp_path):
    ran = []

    def execute(cell):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return facts(cell.way)

    cells = main_column()[:6]
    with pytest.raises(KeyboardInterrupt):
        Results(tmp_path).run(cells, execute)
    assert list(Results(tmp_path).read()) and set(Results(tmp_path).read()) == set(cells[:3])
    again = []
    Results(tmp_path).run(cells, lambda cell: again.append(cell) or facts(cell.way))
    assert again == cells[3:]
    assert not list(tmp_path.glob("*.part"))


def test_only_matching_cells_are_run(tmp_path):
    ran = []
    Results(tmp_path).run(main_column(), lambda c: ran.append(c) or facts(c.way), ["t5/*/accelerate/*"])
    assert ran == [Cell("t5", MAIN, RIVAL, n) for n in range(TRIALS)]


def test_no_cell_begins_after_time_is_over_and_the_rest_is_returned(tmp_path):
    cells, ran = main_column()[:4], []
    left = Results(tmp_path).run(
        cells, lambda c: ran.append(c) or facts(c.way), may_begin=lambda: len(ran) < 2
    )
    assert (ran, left) == (cells[:2], cells[2:])


def test_a_failure_is_kept_its_other_trials_are_spared_and_retry_runs_it_again(tmp_path):
    cells = [Cell("t5", MAIN, "AirLLM", n) for n in range(TRIALS)]
    results = Results(tmp_path)
    results.run(cells, lambda c: {"way": c.way, "failed": "ValueError: no such architecture"})
    assert set(results.read()) == {cells[0]}
    results.run(cells, lambda c: facts(c.way))
    assert "failed" in results.read()[cells[0]]
    results.run(cells, lambda c: facts(c.way), retry=True)
    assert set(results.read()) == set(cells)
    assert pass_s(results.read().values()) == 9.0


def test_table_says_who_is_first_by_how_much_and_what_could_not_run(found):
    found = {c: f for c, f in found.items() if c.way != "AirLLM" or c.trial == 0}
    found[Cell("dit", MAIN, "AirLLM")] = {"way": "AirLLM", "failed": "ValueError: Unrecognized model"}
    text = page.markdown(found)
    first = "blockstream auto is first: 1.60x as fast as the best other, safetensors mmap"
    assert text.count(first) == 3 * len(MODELS)
    assert text.count("blockstream auto is NOT FIRST: 0.80x as fast as the best other, resident") == len(
        MODELS
    )
    assert "2.40x as fast as accelerate" in text
    assert "| AirLLM | could not run |" in text
    assert "* AirLLM: ValueError: Unrecognized model" in text
    # 1 s of reading beside 2 s of compute: ours shows half of it.
    assert (
        "| blockstream auto | 2.50 | 2.50 2.50 2.50 | 3.50 |  | 3.00 | 0.00 | 1.07 | 0.50 | 0.5 | 0.0 |"
        in text
    )
    assert text.count("All that ran gave the same bits.") == len(MODELS)


def test_verdict_admits_a_faster_peer_and_counts_three_percent_as_level():
    assert "NOT FIRST: 0.80x" in page.verdict({AUTO: [facts(AUTO, 5.0)], RIVAL: [facts(RIVAL, 4.0)]})
    assert "level: 0.98x" in page.verdict({AUTO: [facts(AUTO, 5.0)], RIVAL: [facts(RIVAL, 4.9)]})


def test_verdict_names_plain_pytorch_where_nothing_is_read():
    kept = {AUTO: [facts(AUTO, 5.0, read_nbytes=[5 << 30, 0, 0])], RIVAL: [facts(RIVAL, 6.0)]}
    assert "0.90x as fast as plain PyTorch" in page.verdict(kept, 4.5)
    assert "PyTorch" not in page.verdict({**kept, AUTO: [facts(AUTO, 5.0)]}, 4.5)


def test_other_bits_are_named(found):
    found[Cell("t5", MAIN, RIVAL, 0)] = facts(RIVAL, digest="other")
    assert "Other bits than the rest: accelerate." in page.markdown(found)


def test_cause_of_a_failure_is_the_last_error_raised_or_the_kill():
    log = 'Traceback:\n  File "x"\nKeyError: 1\n\nDuring:\nairllm.x.OddError: no T5\nModel type should be a'
    assert page.cause(1, log) == "airllm.x.OddError: no T5"
    assert page.cause(-9, log) == "killed: out of memory under its limit"
    assert page.cause(3, "") == "exit 3"


def test_figure_and_data_are_made_from_cells_alone(found, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks._results.FOLDER", tmp_path)
    found[Cell("dit", MAIN, "AirLLM")] = {"way": "AirLLM", "failed": "ValueError"}
    link = page.draw(found)
    (picture,) = tmp_path.glob("*-peers.png")
    assert picture.name in link
    assert picture.stat().st_size > 10_000
    kept = json.loads(json.dumps(page.data(found)))
    assert kept["best_other"]["t5"] == "safetensors mmap"
    assert len(kept["cells"]) == len(found)


def test_disk_is_checked_before_an_environment_is_made(tmp_path, monkeypatch):
    with pytest.raises(NoRoomError, match="free some space"):
        check_disk(tmp_path, 1 << 60, "a copy")
    monkeypatch.setattr("benchmarks.peers.environments.ENVIRONMENT_NBYTES", 1 << 60)
    with pytest.raises(NoRoomError), environment(tmp_path / "environment", ["airllm"]):
        pass
    assert not (tmp_path / "environment").exists()
