"""Sliding tile attention in a run: planned, counted, reported, searched for, beside merging."""

import json

import pytest
import torch
from blockstream_sta.tiles import Tiling
from safetensors.torch import load_file

from blockstream.cli.main import main
from tests.support import full_attention
from tests.support.packages import site_on_path

TILE = [2, 2, 2]
WINDOWS = {"name": "sta", "windows": [1, 1, 3], "tile": TILE, "dense_steps": 1}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Run the pipeline with some attention transforms; return its report and latents."""
    weights = full_attention.save_weights(tmp_path / "weights")
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        groups = {"blockstream": {"full-attention": "tests.support.full_attention"}}
        site.install("full-attention", {}, groups)
        config = tmp_path / "mine.yaml"
        config.write_text(json.dumps({"pipeline": "full-attention", "folder": str(weights), "arena": "1MiB"}))

        def run(name, attention=(), *more):
            out = tmp_path / name
            sets = ["--set", f"attention={json.dumps(list(attention))}", *more]
            assert main(["run", str(config), "--out", str(out), *sets]) == 0
            report = json.loads((out / "report.json").read_text())
            return report, load_file(out / full_attention.LATENTS)

        run.config = config
        yield run


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_windows_are_planned_counted_and_reported(runs):
    _, dense = runs("dense")
    report, windowed = runs("windows", [WINDOWS])
    assert not same(dense, windowed)
    kernels, (said,) = report["attention"]["kernels"], report["attention"]["said"].values()
    assert kernels["layers"] == 3 and kernels["calls"] == 2 * 4 * 3
    share = kernels["by_step"]["1"]
    assert list(kernels["by_step"]) == ["0", "1", "2", "3"] and kernels["by_step"]["0"] == 1
    assert Tiling(full_attention.GRID, tuple(TILE)).density((1, 1, 3)) < share < 0.5
    assert said["calls"] == {"dense": 6, "gathered": 18} and said["canvases"][0]["whole_tiles"]
    first, *others = report["output"]["pace"][:4]
    assert first == 1 and all(share < p < 1 for p in others)


def test_windows_over_everything_give_the_bits_of_any_kernel_that_sees_everything(runs):
    whole = {**WINDOWS, "windows": [9, 9, 9]}
    report, a = runs("whole", [whole])
    _, b = runs("later", [{**WINDOWS, "dense_steps": 4}])
    assert same(a, b)
    assert report["attention"]["kernels"]["density"] == 1


def test_merged_steps_run_dense_and_the_report_says_so(runs, tmp_path, capsys):
    table = tmp_path / "table.safetensors"
    search(runs, table, tmp_path / "search")
    report, _ = runs("both", [{"name": "tdtm", "merge_steps": 2}, {"name": "sta", "table": str(table)}])
    attention = report["attention"]
    assert attention["merged_passes"] == 4 and attention["plain_passes"] == 4
    assert attention["kernels"]["by_step"].keys() == {"2", "3"}
    assert attention["said"]["sta:sta"]["merged_layers_run_dense"] == 3
    assert attention["kernels"]["merged_layers"] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 layers run dense while their tokens are merged" in printed
    assert "3 layers are computed by a plugin's kernel, called 12 times" in printed


def test_streamed_equals_resident_with_windows(runs):
    sets = ["--set", f"attention={json.dumps([WINDOWS])}"]
    assert main(["verify", str(runs.config), *sets]) == 0


def search(runs, table, out, *more):
    windows = ["--window", "1,1,3", "--window", "2,1,1", "--tile", "2,2,2", "--dense-steps", "1"]
    return main(
        ["sta", "search", str(runs.config), "--table", str(table), "--out", str(out), *windows, *more]
    )


def test_a_search_leaves_the_result_dense_and_writes_a_table_that_a_run_takes(runs, tmp_path, capsys):
    table = tmp_path / "table.safetensors"
    assert search(runs, table, tmp_path / "search") == 0
    said = capsys.readouterr().out
    assert "4 steps, 3 layers of 2 heads on 4x4x6" in said and "of the pairs of tokens" in said
    found = load_file(table)
    assert found["choice"].shape == (4, 3, 2)
    assert found["windows"].tolist() == [[1, 1, 3], [2, 1, 1], [2, 2, 3]]
    assert (found["choice"][0] == 2).all() and set(found["choice"][1:].unique().tolist()) <= {0, 1}
    _, dense = runs("dense", [{**WINDOWS, "dense_steps": 4}])
    assert same(load_file(tmp_path / "search" / full_attention.LATENTS), dense)
    report, _ = runs("table", [{"name": "sta", "table": str(table)}])
    assert report["attention"]["said"]["sta:sta"]["windows"] == str(table)


def test_a_search_never_replaces_a_table_unasked(runs, tmp_path, capsys):
    table = tmp_path / "table.safetensors"
    table.write_bytes(b"mine")
    assert search(runs, table, tmp_path / "search") == 2
    assert "is there already" in capsys.readouterr().err and table.read_bytes() == b"mine"
    assert search(runs, table, tmp_path / "search", "--overwrite") == 0


def test_a_table_for_another_model_is_refused_before_anything_is_read(runs, tmp_path, capsys):
    code = main(["run", str(runs.config), "--out", str(tmp_path / "x"), "--set", "attention=[sta]"])
    said = capsys.readouterr().err
    assert code == 2 and "30x48x80 tokens, 60 layers of 24 heads" in said and "4x4x6" in said
    assert not (tmp_path / "x").exists()
