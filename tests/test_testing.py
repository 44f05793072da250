"""The fixture for engineers who time their own models."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from blockstream.testing import drop_page_cache

pytest_plugins = ["pytester"]

MODEL = """
import torch
from torch import nn
from blockstream.checkpoint.write.synthesis import synthesise


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def spec():
    with torch.device("meta"):
        return {n: ("F32", tuple(t.shape)) for n, t in Model().state_dict().items()}


def forward(module):
    with torch.no_grad():
        module(torch.ones(1, 64))
"""


def run(pytester, test, *options):
    """Run a test file that times `Model`; return the outcome."""
    pytester.makepyfile(model=MODEL)
    pytester.makepyfile(test)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        pytester._monkeypatch.delenv(name, raising=False)
    return pytester.runpytest_subprocess(
        "-p", "blockstream.testing", "-p", "no:cacheprovider", "-q", *options, timeout=120
    )


def test_a_model_is_timed_cold_in_rounds_with_the_ledgers_figures(pytester):
    done = run(
        pytester,
        """
        from model import Model, forward, spec, synthesise

        def test_it(stream_benchmark, tmp_path):
            folder = synthesise(spec(), tmp_path / "c").root
            runs = stream_benchmark(Model, folder, forward, passes=3, rounds=2, arena=3 * 5 * 4096)
            assert runs.held and len(runs.figures) == len(runs.reports) == 2
            assert runs.median("read_nbytes") > 0
        """,
        "--benchmark-json=found.json",
        "--benchmark-only",
    )
    done.assert_outcomes(passed=1)
    found = json.loads((pytester.path / "found.json").read_text())["benchmarks"][0]
    assert found["stats"]["rounds"] == 2
    figures = found["extra_info"]
    assert figures["passes"] == 3 and figures["held"] is True
    assert figures["cold"] is True
    assert figures["read_nbytes"] >= 3 * 2 * 64 * 64 * 4, "at least two blocks were streamed in each pass"
    assert figures["wall_s"] > 0 and figures["predicted_s"] > 0 and figures["slots"] >= 2
    assert len(figures["rounds"]) == 2


def test_a_forward_that_fails_closes_its_session(pytester):
    done = run(
        pytester,
        """
        import threading
        import pytest
        from model import Model, spec, synthesise

        def fail(module):
            raise RuntimeError("mine")

        def test_it(stream_benchmark, tmp_path):
            folder = synthesise(spec(), tmp_path / "c").root
            before = threading.active_count()
            with pytest.raises(RuntimeError, match="mine"):
                stream_benchmark(Model, folder, fail)
            assert threading.active_count() == before
        """,
    )
    done.assert_outcomes(passed=1)


def test_without_pytest_benchmark_the_fixture_says_what_is_missing(pytester):
    done = run(pytester, "def test_it(stream_benchmark): pass", "-p", "no:benchmark")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*stream_benchmark needs pytest-benchmark: pip install pytest-benchmark*"])


def test_the_fixture_is_registered_with_pytest():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"blockstream.testing": "blockstream.testing"}


def test_pytest_loads_nothing_of_the_engine_with_the_fixture(pytester):
    done = run(
        pytester,
        """
        import sys

        def test_it():
            assert "torch" not in sys.modules and "blockstream.engine.engine" not in sys.modules
        """,
    )
    done.assert_outcomes(passed=1)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_files_and_folders_are_dropped_from_the_page_cache(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    files = [tmp_path / "a.bin", tmp_path / "below" / "b.bin"]
    for file in files:
        file.write_bytes(bytes(4096))
    dropped = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, at, n, advice: dropped.append((at, n, advice)))
    assert drop_page_cache(tmp_path)
    assert drop_page_cache(files[0])
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 3
