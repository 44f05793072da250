"""The race of benchmarks.streaming as benchmark runs: `pytest benchmarks/test_streaming.py --benchmark-only`.

STREAMING_WEIGHTS names the folder of the full-size weights (4.9 GB, made when it is not there); without it
the encoder is a small one and the control group as tight for it. Each round is a process of its own, cold; a
round's time is that of its forwards, in `extra_info` as well, pass by pass.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import t5_xxl
from benchmarks.contestant import WAYS
from benchmarks.streaming import BUDGET, PASSES, run
from blockstream.budget.amounts import parse_nbytes
from blockstream.testing import drop_page_cache
from tests.support.cgroup import why_not

WEIGHTS = os.environ.get("STREAMING_WEIGHTS")
SMALL_BUDGET = "420MiB"
ROUNDS = 5 if WEIGHTS else 2

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if WEIGHTS:
        return t5_xxl.checkpoint(Path(WEIGHTS))
    return t5_xxl.checkpoint(tmp_path_factory.mktemp("weights") / "small", "small")


@pytest.mark.skipif(why_not("memory") is not None, reason=str(why_not("memory")))
@pytest.mark.parametrize("way", [w for w in WAYS if w != "resident"])
@pytest.mark.benchmark(group="streaming")
def test_way(benchmark, folder, way):
    """Time processes whole, imports included; what counts is in `extra_info`."""
    budget = BUDGET if WEIGHTS else SMALL_BUDGET
    found = []

    def once():
        arguments = ("--budget", budget, "--passes", str(PASSES))
        found.append(run(way, folder, limit=parse_nbytes(budget), arguments=arguments))

    benchmark.pedantic(once, setup=lambda: drop_page_cache(folder) and None, rounds=ROUNDS, warmup_rounds=0)
    failed = [f["failed"] for f in found if "failed" in f]
    assert not failed
    forwards = [sum(f["passes_s"]) for f in found]
    benchmark.extra_info.update(
        forwards_s=statistics.median(forwards), rounds=[f["passes_s"] for f in found], budget=budget
    )
    assert len({f["digest"] for f in found}) == 1


@pytest.mark.benchmark(group="streaming in this process")
def test_fixture(stream_benchmark, folder):
    """The same encoder through the fixture that blockstream has for everyone's own models."""
    ids = t5_xxl.tokens()
    block = t5_xxl.block_nbytes(folder)

    def forward(module):
        with torch.inference_mode():
            module(ids)

    runs = stream_benchmark(
        lambda: t5_xxl.build(folder),
        folder,
        forward,
        passes=PASSES,
        rounds=ROUNDS,
        arena=8 * block + (8 << 20),
    )
    assert runs.held
    assert runs.median("read_nbytes") < PASSES * 12 * block, "what is retained is read once"
