"""How long planning takes: `pytest benchmarks/test_planner.py --benchmark-only`."""

from __future__ import annotations

import math
import time

import pytest

from benchmarks.policies import equal, unequal
from blockstream.plan.planner import Plan, make_plan
from blockstream.plan.segments import Schedule, Stage

KINDS = {"equal": lambda blocks: equal(1.7, blocks=blocks), "unequal": unequal}
#: The most processor seconds that planning may take, by the number of segments.
MOST_S = {100: 0.3, 1_000: 1.0, 10_000: 15.0}


def plan(stage: Stage) -> Plan:
    return make_plan(Schedule((stage,)), stage.nbytes // 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", MOST_S)
@pytest.mark.benchmark(group="planning", timer=time.process_time, min_rounds=1, warmup=False)
def test_plan(benchmark, blocks, kind):
    stage = KINDS[kind](blocks)
    made = benchmark.pedantic(plan, args=(stage,), rounds=3 if blocks < 10_000 else 1, warmup_rounds=1)
    assert made.stages[0].policy == "spread"
    assert made.arena_nbytes <= stage.nbytes // 2
    assert benchmark.stats.stats.median < MOST_S[blocks]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="growth", timer=time.process_time)
def test_planning_grows_no_faster_than_b_log_b(benchmark, kind):
    small, large = 500, 4_000

    def seconds(blocks: int) -> float:
        begin = time.process_time()
        plan(KINDS[kind](blocks))
        return time.process_time() - begin

    few = min(seconds(small) for _ in range(3))
    many = benchmark.pedantic(seconds, args=(large,), rounds=2, warmup_rounds=0)
    assert many / few < 1.5 * large * math.log(large) / (small * math.log(small))
