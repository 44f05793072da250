"""The paper's figures from ledgers: cycles of several runs on one scale, and straightness."""

from __future__ import annotations

import shutil

import pytest

from blockstream.cli.main import main
from blockstream.engine.ledger import Ledger, Note
from blockstream.engine.spans import Span
from blockstream.errors import ConfigError
from blockstream.plan.segments import Visit
from blockstream.plugins.euler import sample
from blockstream.report.cycles import draw_cycles, stages_of
from blockstream.report.record import read_run
from blockstream.report.sampling import samplings
from blockstream.report.straightness import draw_straightness, panels_of
from blockstream.run.watched import WatchedSampler
from tests.support.flows import Formula, bending
from tests.support.runs import MIB, full_size, write_run

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """The same networks in an arena that holds little of them."""
    return write_run(tmp_path_factory.mktemp("runs") / "sequential", full_size(arena_nbytes=500 * MIB))


def lanes(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_a_panel_a_run_on_one_scale(finished, sequential):
    records = [read_run(sequential), read_run(finished)]
    assert stages_of(records) == ["t5", "dit", "vae"]
    figure = draw_cycles(records, "dit", visits=10)
    assert [ax.get_title(loc="left").split(":")[0] for ax in figure.axes] == [
        "(a) sequential",
        "(b) finished",
    ]
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert all(lanes(ax) == ["execute", "load"] for ax in figure.axes)
    for ax in figure.axes:
        executed = ax.collections[0].get_paths()
        assert len(executed) == 10


def test_the_second_pass_is_shown_or_the_only_one(finished):
    record = read_run(finished)
    dit, t5 = (draw_cycles([record], stage, visits=4) for stage in ("dit", "t5"))
    second = [b for b in record.of("dit", "execute") if b.pass_index == 1][:4]
    assert f"{second[-1].end_s - second[0].start_s:.2g}" in dit.axes[0].get_title(loc="left")
    assert "4 blocks" in t5.axes[0].get_title(loc="left")


def test_copies_over_a_link_have_a_lane_of_their_own(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.note("plan", {"stages": [{"name": "dit", "order": [0, 1], "retained": [], "slots": 2}]})
    for i in range(2):
        visit = Visit(0, 0, i)
        ledger.add(Span("loader", "load", i, i + 0.5, f"blocks.{i}", visit, 100))
        ledger.add(Span("link", "copy", i + 0.5, i + 0.7, f"blocks.{i}", visit, 100))
        ledger.add(Span("compute", "execute", i + 0.7, i + 1.0, f"blocks.{i}", visit))
    ledger.close()
    (ax,) = draw_cycles([read_run(tmp_path)], "dit").axes
    assert lanes(ax) == ["execute", "copy", "load"]


def test_a_stage_that_was_not_computed_is_named(finished):
    with pytest.raises(ConfigError, match="has not computed unet; it has t5, dit, vae"):
        draw_cycles([read_run(finished)], "unet")


def test_a_flows_name_is_noted_beside_its_steps():
    class Named(Formula):
        name = "unit 2, stage 1"

    ledger = Ledger()
    WatchedSampler(sample, ledger)(Named(bending, 4), torch.ones(1, 3))
    (steps,) = samplings(ledger.notes)
    assert steps.name == "unit 2, stage 1" and len(steps.cosine) == 4


def sampling(run, cosines, name=""):
    more = {"name": name} if name else {}
    steps = [{"run": run, "i": i, "to": i + 1, "of": len(cosines), "t": 1.0} for i in range(len(cosines))]
    return [Note("step", 0.0, {**s, "cosine": c, **more}) for s, c in zip(steps, cosines, strict=True)]


def with_notes(record, notes):
    record.notes[:] = notes
    record.__dict__.pop("steps", None)
    return record


def test_prompts_are_lines_of_one_panel(finished):
    notes = sampling(0, [None, 0.9, 0.95]) + sampling(1, [None, 0.8, 0.99])
    (title, lines), *rest = panels_of(with_notes(read_run(finished), notes), "finished").items()
    assert title == "finished" and not rest
    assert [line.points for line in lines] == [[(1, 0.9), (2, 0.95)], [(1, 0.8), (2, 0.99)]]


def test_units_and_stages_have_the_first_and_the_last_unit_side_by_side(finished):
    notes, run = [], 0
    for _prompt in range(2):
        for unit in (1, 2, 3):
            for stage in (1, 2):
                cosine = 0.5 + 0.1 * unit + 0.01 * stage + (0.02 if _prompt else 0)
                notes += sampling(run, [None, cosine], f"unit {unit}, stage {stage}")
                run += 1
    panels = panels_of(with_notes(read_run(finished), notes), "finished")
    assert list(panels) == ["finished: unit 1", "finished: unit 3"]
    assert [line.name for line in panels["finished: unit 3"]] == ["stage 1", "stage 2"]
    ((_, mean),) = panels["finished: unit 3"][1].points
    assert mean == pytest.approx(0.83)
    figure = draw_straightness([with_notes(read_run(finished), notes)])
    assert len(figure.axes) == 2


def test_runs_of_one_name_are_told_by_their_folders(finished, tmp_path):
    other = read_run(shutil.copytree(finished, tmp_path / "finished"))
    titles = [ax.get_title(loc="left") for ax in draw_straightness([read_run(finished), other]).axes]
    assert titles == [f"(a) {finished}", f"(b) {other.folder}"]


def test_a_run_without_velocities_draws_no_straightness(finished):
    assert draw_straightness([with_notes(read_run(finished), [])]) is None


def test_the_command_writes_every_figure(finished, sequential, tmp_path, capsys):
    to = tmp_path / "figures"
    assert main(["figures", str(sequential), str(finished), "--to", str(to)]) == 0
    names = {"cycles-dit.png", "cycles-t5.png", "cycles-vae.png", "straightness.png"}
    assert {p.name for p in to.iterdir()} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in to.iterdir())
    assert main(["figures", str(finished), "--to", str(to), "--stage", "unet"]) == 2
    assert main(["figures", str(finished), "--to", str(to), "--visits", "0"]) == 2
    shutil.rmtree(to)
