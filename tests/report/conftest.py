"""Folders of runs, made once: nothing here changes them."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.runs import full_size, write_ledger, write_run


@pytest.fixture(scope="session")
def plan():
    return full_size()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, plan):
    """A finished run of three stages."""
    return write_run(tmp_path_factory.mktemp("runs") / "finished", plan)


@pytest.fixture
def killed(tmp_path, plan):
    """A run that was killed in its second stage: no report, a last line cut short."""
    folder = tmp_path / "killed"
    folder.mkdir()
    write_ledger(folder / "ledger.jsonl", plan, upto_s=8.0)
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('["compute","execute",8.0,8.')
    return folder


@pytest.fixture
def older(tmp_path, plan):
    """A run of a version that wrote no notes and fewer figures."""
    folder = tmp_path / "older"
    folder.mkdir()
    write_ledger(folder / "ledger.jsonl", plan, notes=False)
    names = ("t5", "dit", "vae")
    stages = [{"name": n, "passes": 1, "b": 4, "d": 0, "read_nbytes": 9, "wall_s": 2.0} for n in names]
    report = {"schema": 1, "stages": stages, "sampler": "euler", "output": {}, "wall_s": 0}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copied")
