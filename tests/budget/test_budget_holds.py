"""The budget holds where the kernel enforces it: benchmarks.budget_holds and benchmarks.soak, made small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks._beside import moving_limit, taking
from blockstream.checkpoint.write.synthesis import synthesise
from tests.support.cgroup import limited, why_not
from tests.support.perceptrons import BLOCK, Model

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
#: Runs passes under a budget; prints the least that works where it is refused.
PROGRAM = """
import hashlib, json, sys, torch, blockstream
from blockstream.errors import BudgetError
from tests.support.perceptrons import Model, X

folder, budget, passes = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
try:
    with torch.no_grad(), blockstream.open(budget=budget) as s:
        module = s.stage("m", Model, folder, passes=passes)
        outputs = {hashlib.sha256(module(X).numpy().tobytes()).hexdigest() for _ in range(passes)}
        plans = [n.value["arena_nbytes"] for n in s.ledger.notes if n.kind == "plan"]
        print(json.dumps({"outputs": sorted(outputs), "plans": plans, **s.report()["budget"]}))
except BudgetError as error:
    print(json.dumps({"least": int(str(error).rsplit("the least is ")[1].removesuffix(" MiB")) << 20}))
"""

pytestmark = pytest.mark.skipif(why_not("memory") is not None, reason=str(why_not("memory")))


def command(checkpoint, budget, passes):
    return [sys.executable, "-c", PROGRAM, str(checkpoint), str(budget), str(passes)]


def run(group, checkpoint, budget, passes):
    done = group.run(command(checkpoint, budget, passes), timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with torch.device("meta"):
        spec = {name: ("F32", tuple(t.shape)) for name, t in Model().state_dict().items()}
    return synthesise(spec, tmp_path_factory.mktemp("model") / "c").root


@pytest.fixture(scope="module")
def in_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def found(checkpoint, in_root):
    """Return what a run with all the memory it wants gives, and the least budget that works."""
    with limited(memory_nbytes=4 << 30) as group:
        least = run(group, checkpoint, "60MiB", 1)["least"]
        return {**run(group, checkpoint, "3GiB", 1), "least": least}


@pytest.mark.parametrize("blocks", [4, 8])
def test_a_limit_that_is_the_budget_kills_nothing_and_every_pass_gives_the_same_bits(
    checkpoint, found, blocks
):
    budget = found["least"] + blocks * BLOCK
    with limited(memory_nbytes=budget) as group:
        got = run(group, checkpoint, budget, 4)
    assert got["held"], got
    assert got["outputs"] == found["outputs"]


def test_memory_that_another_process_takes_and_a_limit_that_moves_change_no_bit(checkpoint, found):
    taken = 64 * MIB
    low = found["least"] + taken + 64 * MIB
    high = low + 128 * MIB
    with limited(memory_nbytes=high) as group:
        group.popen(taking(taken, take_s=0.5, hold_s=0.5, pause_s=0.5))
        with moving_limit(group, low, high, every_s=0.2, spare_nbytes=64 * MIB) as limits:
            got = run(group, checkpoint, "auto", 300)
    assert len(got["outputs"]) == 1 and got["outputs"] == found["outputs"]
    assert min(limits) < high
    assert got["held"], got
