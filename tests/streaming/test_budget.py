"""Plans follow the budget: completed in the first pass, less between visits, more between passes."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import blockstream
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.errors import BudgetError
from blockstream.module.guards import CALL, Follower
from blockstream.plan.loads import State
from blockstream.system.limits import Headroom, HeadroomReader, Limit
from blockstream.system.memory import held, trim_heap
from tests.support.costs import fix_costs
from tests.support.models import aligned
from tests.support.perceptrons import BLOCK, BLOCKS, Block, Model, X

MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped


class Quiet(Block):
    """A block whose `work` is none of the tests'."""

    work = staticmethod(lambda x: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with torch.device("meta"):
        spec = {name: ("F32", tuple(t.shape)) for name, t in Model().state_dict().items()}
    return synthesise(spec, tmp_path_factory.mktemp("model") / "c").root


@pytest.fixture(scope="module")
def want(checkpoint):
    """Return what the resident module gives for an input."""
    from safetensors.torch import load_file

    module = Model(Quiet)
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    module = aligned(module)

    @torch.no_grad()
    def get(x):
        return module(x)

    return get


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    """Have the planner count on loads that take twice as long as compute, whatever this machine does."""
    fix_costs(monkeypatch, load_s=2, execute_s=1)


@pytest.fixture(autouse=True)
def compute(monkeypatch):
    """Set what blocks do while they compute; no gradients."""

    def set_work(work):
        monkeypatch.setattr(Block, "work", staticmethod(work))

    with torch.no_grad():
        warm()
        yield set_work


def warm():
    """Have the libraries allocate their workspaces before memory is judged, and large blocks from the system.

    A heap that other tests have left holes in would otherwise take them without holding more.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
    torch.relu(nn.Linear(512, 2048)(X))
    gc.collect()
    trim_heap()


def taken(nbytes):
    """Return memory that is held until it is forgotten: from the system, whatever holes the heap has."""
    room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, nbytes, mmap.PAGESIZE):
        room[page] = 1
    return room


def retained(s):
    return len(s.plan.stages[0].retained)


def opened(checkpoint, nbytes, passes=None, **more):
    """Return a session with room for weights and activations of about `nbytes`, and its module."""
    beside = held().nbytes + 20 * MIB
    s = blockstream.open(budget=beside + nbytes, **more)
    return s, s.stage("m", Model, checkpoint, passes=passes)


def test_the_plan_is_completed_inside_the_first_pass(checkpoint, want):
    s, module = opened(checkpoint, 6 * BLOCK, passes=5)
    with s:
        s.start()
        first = retained(s)
        assert torch.equal(module(X), want(X))
        plans = [n.value for n in s.ledger.notes if n.kind == "plan"]
        executed = [x for x in s.ledger.spans if x.kind == "execute"]
        second = next(n for n in s.ledger.notes if n.kind == "plan" and n.value != plans[0])
        assert sum(x.end_s < second.at_s for x in executed) < BLOCKS, "before the first pass ended"
        assert len(plans[1]["stages"][0]["retained"]) > first
        assert torch.equal(module(X), want(X))
        assert s.report()["budget"]["held"]


def test_nothing_fills_the_arena_before_compute_has_shown_what_it_needs(checkpoint, want, compute):
    s, module = opened(checkpoint, 12 * BLOCK, passes=3, policy="prefix")
    in_use = []

    def look(x):
        """Wait until what may be loaded is, in the first two visits."""
        engine, expected = s._tier.engine, (5 * BLOCK, 7 * BLOCK, 0)[min(len(in_use), 2)]

        def nbytes():
            live = engine._scheduler.live
            return 0 if State.LOADING in live.values() else sum(load.extent.nbytes for load in live)

        with engine._condition:
            assert engine._condition.wait_for(lambda: nbytes() >= expected, 20), nbytes()
            in_use.append(nbytes())

    compute(look)
    with s:
        s.start()
        assert s.plan.arena_nbytes >= 7 * BLOCK
        assert torch.equal(module(X), want(X))
        assert in_use[0] < 6.5 * BLOCK, "half of the room beyond two slots, and the next visit"


def test_what_compute_takes_is_not_given_to_weights(checkpoint, want, compute):
    s, module = opened(checkpoint, 12 * BLOCK, passes=4)
    compute(lambda x: (taken(50 * MIB), s.watch.sample()))
    with s:
        for _ in range(4):
            assert torch.equal(module(X), want(X))
        report = s.report()["budget"]
        assert report["held"], report
        assert report["by_cause"]["activations"] >= 45 * MIB
        assert retained(s) < 7


def test_activations_that_grow_make_room_between_visits(checkpoint, want, compute):
    s, module = opened(checkpoint, 8 * BLOCK, passes=None)
    with s:
        for _ in range(2):
            module(X)
        before, kept = retained(s), set(s.plan.stages[0].retained)
        sizes = iter([1, 2, 12, 12, 40, 40, 40, 40, 40, 40])
        compute(lambda x: (taken(next(sizes) * MIB), s.watch.sample()))
        loads = len([x for x in s.ledger.spans if x.kind == "load"])
        assert torch.equal(module(X), want(X))
        assert retained(s) < before
        assert set(s.plan.stages[0].retained) < kept
        stay = {f"blocks.{i}" for i in s.plan.stages[0].retained}
        read = {x.label for x in [x for x in s.ledger.spans if x.kind == "load"][loads:]}
        assert not stay & read, "what is still retained was not read again"
        compute(lambda x: None)
        assert torch.equal(module(X), want(X))


def test_a_cache_that_grows_shrinks_what_is_retained_and_the_budget_holds(checkpoint, want, compute):
    s, module = opened(checkpoint, 8 * BLOCK, passes=None)
    cache = []
    with s:
        module(X)
        module(X)
        before = retained(s)
        compute(lambda x: cache.append(taken(MIB)))
        for _ in range(4):
            assert torch.equal(module(X), want(X))
        assert retained(s) < before
        assert s.report()["budget"]["held"], s.report()["budget"]


def test_larger_inputs_make_room_before_they_are_computed(checkpoint, want, compute):
    s, module = opened(checkpoint, 7 * BLOCK, passes=None)
    compute(lambda x: (taken(x.shape[0] * MIB), s.watch.sample()))
    with s:
        for _ in range(3):
            module(X)
        before = retained(s)
        many = torch.cat([X] * 10)
        at_first = []
        compute(lambda x: (at_first.append(retained(s)), taken(x.shape[0] * MIB), s.watch.sample()))
        assert torch.equal(module(many), want(many))
        assert at_first[0] < before
        assert s.report()["budget"]["held"], s.report()["budget"]


def test_a_lower_budget_is_kept_from_the_next_visit_on(checkpoint, want):
    s, module = opened(checkpoint, 8 * BLOCK, passes=None)
    with s:
        for _ in range(2):
            module(X)
        touched, now = s.touched_nbytes(), held().nbytes
        s.set_budget(s.report()["budget"]["nbytes"] - 4 * BLOCK)
        assert s.touched_nbytes() <= touched - 2 * BLOCK
        assert held().nbytes < now - 2 * BLOCK
        for _ in range(2):
            assert torch.equal(module(X), want(X))
        assert s.plan.arena_nbytes <= touched - 2 * BLOCK


def test_a_higher_budget_is_used_from_the_next_pass_on(checkpoint, want):
    s, module = opened(checkpoint, 6 * BLOCK, passes=None)
    with s:
        for _ in range(2):
            module(X)
        before = retained(s)
        s.set_budget(held().nbytes + 20 * BLOCK)
        assert retained(s) == before
        for _ in range(2):
            assert torch.equal(module(X), want(X))
        assert retained(s) == BLOCKS
        assert s.report()["budget"]["held"]


def test_a_budget_that_cannot_hold_the_least_is_refused_and_nothing_changes(checkpoint, want):
    s, module = opened(checkpoint, 6 * BLOCK, passes=None)
    with s:
        for _ in range(2):
            module(X)
        plan = s.plan
        with pytest.raises(BudgetError, match=r"2 slots of the largest segment \(blocks\.\d.*the least is"):
            s.set_budget("50MiB")
        assert s.plan is plan
        assert torch.equal(module(X), want(X))
        assert s.report()["budget"]["nbytes"] > 50 * MIB


def test_the_named_least_runs_and_one_percent_less_is_refused(checkpoint):
    program = """
import sys, torch, blockstream
from blockstream.errors import BudgetError
from blockstream.plan.loads import State
from tests.support.perceptrons import Model, X

for budget in sys.argv[2:]:
    try:
        with torch.no_grad(), blockstream.stream(Model, sys.argv[1], budget=int(budget), passes=2) as m:
            m(X), m(X)
            print("held" if blockstream.session(m).report()["budget"]["held"] else "broken")
    except BudgetError as error:
        print(str(error).rsplit("the least is ")[1].removesuffix(" MiB"))
"""

    def run(nbytes):
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", program, str(checkpoint), str(nbytes)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    least = int(run(60 * MIB)) * MIB
    assert run(least) == "held"
    assert run(int(least * 0.99)).isdigit(), "refused, naming the least"


def test_nothing_is_mapped_before_a_budget_is_refused(checkpoint, monkeypatch):
    made = []
    monkeypatch.setattr("blockstream.streaming.host_tier.Arena", made.append)
    with blockstream.open(budget="60MiB") as s:
        module = s.stage("m", Model, checkpoint)
        with pytest.raises(BudgetError):
            module(X)
    assert not made


class Free:
    """What the system has to give, moved by a test; what this process takes is gone from it."""

    def __init__(self, monkeypatch) -> None:
        self.leave(1 << 40)
        monkeypatch.setattr(HeadroomReader, "read", lambda reader, system=None: self.read())
        monkeypatch.setattr("blockstream.budget.governor.LOOK_S", 0.0)

    def leave(self, nbytes: int) -> None:
        """Have another process take all but so much."""
        self.total = nbytes + held().nbytes

    def read(self) -> Headroom:
        return Headroom((Limit("made up", self.total, held().nbytes),))


def test_auto_gives_way_to_another_process_and_comes_back(checkpoint, want, monkeypatch):
    free = Free(monkeypatch)
    free.leave(95 * MIB)
    with blockstream.open(budget="auto") as s:
        module = s.stage("m", Model, checkpoint, passes=None)
        for _ in range(2):
            assert torch.equal(module(X), want(X))
        before, touched = retained(s), s.touched_nbytes()
        assert before > 3
        free.leave(0)
        assert torch.equal(module(X), want(X))
        assert retained(s) < before
        assert s.touched_nbytes() < touched
        free.leave(400 * MIB)
        for _ in range(2):
            assert torch.equal(module(X), want(X))
        assert retained(s) == BLOCKS


def test_an_explicit_budget_above_what_there_is_warns_and_keeps_to_what_there_is(
    checkpoint, want, monkeypatch, caplog
):
    free = Free(monkeypatch)
    free.leave(100 * MIB)
    with caplog.at_level(logging.WARNING), blockstream.open(budget=held().nbytes + 500 * MIB) as s:
        assert "is above the" in caplog.text
        module = s.stage("m", Model, checkpoint, passes=None)
        for _ in range(3):
            assert torch.equal(module(X), want(X))
        assert retained(s) < BLOCKS


def followed(module):
    return sum(isinstance(m.__dict__.get(CALL), Follower) for m in module.modules())


def test_with_everything_in_memory_the_hooks_are_gone(checkpoint, want):
    with blockstream.open(arena="200MiB") as s:
        module = s.stage("m", Model, checkpoint, passes=None)
        assert followed(module) > 0
        for _ in range(2):
            assert torch.equal(module(X), want(X))
        assert followed(module) == 0
        spans = len(s.ledger.spans)
        assert torch.equal(module(X), want(X))
        assert len(s.ledger.spans) == spans
    assert followed(module) == 0


def test_a_stage_without_hooks_gives_memory_back_when_it_is_short(checkpoint, want, monkeypatch):
    free = Free(monkeypatch)
    free.leave(600 * MIB)
    with blockstream.open(budget="auto") as s:
        module = s.stage("m", Model, checkpoint, passes=None)
        for _ in range(3):
            module(X)
        (stage,) = s._stages.values()
        assert stage.settled and retained(s) == BLOCKS
        woken = threading.Event()
        wake = stage.wake
        monkeypatch.setattr(stage, "wake", lambda: (wake(), woken.set()))
        free.leave(0)
        assert woken.wait(timeout=30)
        assert torch.equal(module(X), want(X))
        assert retained(s) < BLOCKS and not stage.settled and followed(module) > BLOCKS
        free.leave(600 * MIB)
        for _ in range(3):
            assert torch.equal(module(X), want(X))
        assert stage.settled


def test_another_budget_ends_running_without_hooks(checkpoint, want):
    with blockstream.open(budget=held().nbytes + 400 * MIB) as s:
        module = s.stage("m", Model, checkpoint, passes=None)
        for _ in range(3):
            module(X)
        assert s._stages["m"].settled and followed(module) == 0
        s.set_budget(held().nbytes - 4 * BLOCK)
        assert followed(module) > BLOCKS
        assert torch.equal(module(X), want(X))
        assert retained(s) < BLOCKS
        s.set_budget(held().nbytes + 400 * MIB)
        for _ in range(3):
            assert torch.equal(module(X), want(X))
        assert followed(module) == 0, "and gone again"


def test_fifty_sessions_leave_no_thread_descriptor_or_map(checkpoint, want):
    def state():
        gc.collect()
        with open("/proc/self/maps") as f:
            large = [x for x in f if _nbytes(x) >= BLOCKS * BLOCK]
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(large)

    def once(i):
        with blockstream.open(arena=(2 + i % 9) * BLOCK) as s:
            module = s.stage("m", Model, checkpoint, passes=2)
            for _ in range(i % 3):
                assert torch.equal(module(X), want(X))

    once(2)
    before, memory = state(), held().nbytes
    for i in range(50):
        once(i)
    assert state() == before
    assert held().nbytes < memory + 2 * BLOCK


def _nbytes(line: str) -> int:
    begin, end = line.split(maxsplit=1)[0].split("-")
    return int(end, 16) - int(begin, 16)
