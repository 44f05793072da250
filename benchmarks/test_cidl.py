"""The paper's findings as one benchmark run: `pytest benchmarks/test_cidl.py --benchmark-only`.

CIDL_WEIGHTS names the folder of the synthetic weights (23 GB in full size; made when it is not there),
CIDL_SMALL=1 takes small networks. The dated result and the figures are written when all modes have run.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.cidl_modes import MODES, RATIO, choose_tokens, median_of, run, stdit3, t5
from benchmarks.cidl_page import write_modes
from blockstream.system.limits import cpu_count

SMALL = os.environ.get("CIDL_SMALL", "") not in ("", "0")
WEIGHTS = os.environ.get("CIDL_WEIGHTS")
ROUNDS = 3
#: Where load and execution take alike, overlap saves at least so much of the sequential time.
LEAST_SAVED = 0.35

pytestmark = [
    pytest.mark.skipif(WEIGHTS is None, reason="CIDL_WEIGHTS names no folder for 23 GB of weights"),
    pytest.mark.timeout(7200),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Subjects with their tokens chosen, and every outcome; the result is written at the end."""
    torch.set_num_threads(cpu_count().threads)
    made, outcomes = {}, defaultdict(lambda: defaultdict(list))
    folder = tmp_path_factory.mktemp("ledgers")

    def one(name: str, mode: str):
        if name not in made:
            made[name] = {"stdit3": stdit3, "t5": t5}[name](Path(str(WEIGHTS)), SMALL)
            choose_tokens(made[name], RATIO[name])
        n = len(outcomes[name][mode])
        outcome = run(made[name], mode, folder / f"{name}-{mode}-{n}.jsonl")
        outcomes[name][mode].append(outcome)
        return outcome

    one.outcomes = outcomes
    yield one
    if made:
        command = "pytest benchmarks/test_cidl.py --benchmark-only"
        write_modes({n: (made[n], outcomes[n]) for n in made}, command, SMALL)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["stdit3", "t5"])
@pytest.mark.benchmark(group="cidl")
def test_mode(benchmark, bench, name, mode):
    outcome = benchmark.pedantic(bench, args=(name, mode), rounds=ROUNDS, warmup_rounds=0)
    benchmark.extra_info.update(l_s=outcome.terms["l_s"], e_s=outcome.terms["e_s"], d=outcome.terms["d"])
    assert outcome.terms["passes"] == {"stdit3": 4, "t5": 1}[name]


def test_concurrent_saves_what_it_should_where_load_and_execution_take_alike(bench):
    found = bench.outcomes["stdit3"]
    if not found["sequential"] or not found["concurrent"]:
        pytest.skip("the modes have not run: use --benchmark-only")
    sequential, concurrent = (median_of(found[mode]) for mode in ("sequential", "concurrent"))
    ratio = sequential.terms["l_s"] / sequential.terms["e_s"]
    if SMALL or not 0.8 <= ratio <= 1.25:
        pytest.skip(f"l/e is {ratio:.2f} here")
    assert 1 - concurrent.wall_s / sequential.wall_s >= LEAST_SAVED
