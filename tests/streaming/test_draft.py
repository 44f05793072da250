"""A draft of a plan leaves no trace: not in the module, the process's maps and heap, or the session."""

from __future__ import annotations

import gc

import pytest
import torch

import blockstream
from blockstream.streaming import starting
from blockstream.system.memory import held, trim_heap
from tests.support import toys
from tests.support.models import assert_same
from tests.support.toys import noise

MIB = 1 << 20


def state_of(module):
    """Return what is the module's: attributes, tables, hooks, and who stands for its parameters."""
    return {
        path: (
            type(m),
            {name: id(value) for name, value in m.__dict__.items()},
            {name: id(p) for name, p in m._parameters.items()},
            {name: id(b) for name, b in m._buffers.items()},
            list(m._modules),
        )
        for path, m in module.named_modules()
    }


def maps() -> int:
    """Return the bytes of anonymous memory that is mapped in pieces of 1 MiB and more."""
    total = 0
    with open("/proc/self/maps") as file:
        for line in file:
            where, *_, last = line.split()
            begin, end = (int(x, 16) for x in where.split("-"))
            if last == "0" and end - begin >= MIB:
                total += end - begin
    return total


@pytest.mark.parametrize("options", [{"arena": "1MiB"}, {"budget": "8GiB"}], ids=["arena", "budget"])
@pytest.mark.parametrize("inputs", [None, (noise(),)], ids=["without", "with example inputs"])
def test_a_draft_leaves_no_trace(twins, options, inputs):
    resident, folder = twins(toys.Stack)
    with torch.no_grad(), blockstream.Session(**options) as s:
        module = s.stage("m", toys.Stack, folder, passes=3, example_inputs=inputs)
        s.draft()  # what it imports, and the libraries' first use
        gc.collect()
        trim_heap()
        before, mapped, nbytes = state_of(module), maps(), held().nbytes
        for _ in range(5):
            s.set_budget(s.budget)  # so that it is planned again
            s.draft()
        gc.collect()
        trim_heap()
        assert state_of(module) == before
        assert maps() <= mapped
        assert held().nbytes < nbytes + MIB
        assert s.touched_nbytes() == 0 and not s.ledger.spans and not s.ledger.notes
        assert_same(module(noise()), resident(noise()))


def test_a_draft_and_a_start_plan_once_and_alike(twins, monkeypatch):
    _, folder = twins(toys.Stack)
    made, first_plan = [], starting.first_plan

    def counted(*arguments):
        made.append(first_plan(*arguments))
        return made[-1]

    monkeypatch.setattr(starting, "first_plan", counted)
    with torch.no_grad(), blockstream.Session(arena="1MiB") as s:
        module = s.stage("m", toys.Stack, folder, passes=3)
        assert s.draft() is s.draft()
        s.start()
        module(noise())
    assert len(made) == 1


def test_a_stage_counts_and_times_nothing_when_it_is_declared(twins, monkeypatch):
    _, folder = twins(toys.Stack)

    def refuse(*arguments, **options):
        raise AssertionError("nothing is planned, rehearsed or timed yet")

    monkeypatch.setattr("blockstream.streaming.stage_facts.rehearse", refuse)
    monkeypatch.setattr("blockstream.streaming.remembered.op_seconds", refuse)
    with blockstream.Session(arena="1MiB") as s:
        s.stage("m", toys.Stack, folder, example_inputs=(noise(),))
