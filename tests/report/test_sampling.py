"""Samplers and merges watched from outside: nothing they compute is changed, what they do is noted."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from blockstream_lpl import LinearProportionalLeap

from blockstream.engine.ledger import Ledger, Note
from blockstream.errors import NonFiniteError, PluginError
from blockstream.plugins import AttentionLayer, Merge
from blockstream.plugins.euler import sample as euler
from blockstream.report.sampling import WatchedMerge, WatchedSampler, cosine, samplings
from blockstream.run.finite import Finite
from tests.support.flows import Formula, bending, straight, turning

Z = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 2, 2)


@pytest.mark.parametrize("sampler", [euler, LinearProportionalLeap()], ids=["euler", "lpl"])
@pytest.mark.parametrize("velocity", [bending, turning, straight(Z)], ids=["bending", "turning", "straight"])
def test_a_watched_sampler_returns_the_same_bits_and_asks_the_same(sampler, velocity):
    plain, watched = Formula(velocity), Formula(velocity)
    assert torch.equal(WatchedSampler(sampler, Ledger())(watched, Z), sampler(plain, Z))
    assert (watched.asked, watched.told) == (plain.asked, plain.told)
    assert [i for i, _, _ in watched.done] == [i for i, _, _ in plain.done]


def test_each_step_is_noted_with_the_cosine_to_the_velocity_before():
    ledger, flow = Ledger(), Formula(turning, n=6)
    WatchedSampler(euler, ledger)(flow, Z)
    (steps,) = samplings(ledger.notes)
    assert steps.indices == tuple(range(6))
    assert (steps.of, steps.leaps, steps.times) == (6, (), tuple(flow.times))
    velocities = [turning(Z, t) for t in flow.times]
    assert steps.cosine[0] is None
    for i in range(1, 6):
        assert steps.cosine[i] == pytest.approx(cosine(velocities[i], velocities[i - 1]), abs=1e-6)


def test_leaps_are_noted_and_each_sampling_apart():
    ledger = Ledger()
    sampler = WatchedSampler(LinearProportionalLeap(), ledger)
    flows = [Formula(straight(Z)), Formula(turning)]
    for flow in flows:
        sampler(flow, Z)
    first, second = samplings(ledger.notes)
    assert first.leaps and len(first.indices) < 30
    assert [b for a, b in first.leaps] == [b for a, b in first.leaps if b > a + 1]
    assert not second.leaps and len(second.indices) == 30


def test_what_a_sampler_offers_besides_is_still_there():
    sampler = LinearProportionalLeap()
    assert WatchedSampler(sampler, Ledger()).passes(30) == sampler.passes(30)


def test_a_sampler_that_works_in_place_does_not_change_the_velocity_before():
    def in_place(flow, z, i=0, memory=None):
        v = flow.velocity(z, 0)
        z = flow.advance(z, v, 0, 1)
        v.zero_()
        flow.velocity(z, 1)
        z = flow.advance(z, flow.velocity(z, 1), 1, 2)
        flow.step_done(1, z, None)
        return z

    ledger = Ledger()
    WatchedSampler(in_place, ledger)(Formula(lambda z, t: torch.ones_like(z), n=2), Z)
    assert samplings(ledger.notes)[0].cosine[1] == pytest.approx(1.0)


def test_the_cosine_of_nothing_is_none():
    assert cosine(torch.zeros(3), torch.ones(3)) is None
    assert cosine(torch.full((3,), float("inf")), torch.ones(3)) is None
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)


def test_merging_is_noted_when_it_begins_and_ends():
    ledger, step = Ledger(), {"now": 0}
    watch = WatchedMerge(ledger)
    merge = Merge(lambda x: x, lambda x: x, torch.zeros(1), active=lambda: step["now"] < 2)
    names = ("a", "b", "c")
    layers = [watch.watch(AttentionLayer(n, "temporal", (4, 1, 3), 8, 2), merge) for n in names]
    for step["now"] in range(4):
        assert [layer.active() for layer in layers] == [step["now"] < 2] * 3
    assert [n.value for n in ledger.notes] == [True, False]
    assert watch.layers == set(names)


def test_notes_of_other_kinds_are_passed_over():
    assert samplings([Note("plan", 0.0, {}), Note("memory", 0.0, [1, 2])]) == []


def test_what_a_sampler_raises_is_blamed_on_it():
    def broken(flow, z, i=0, memory=None):
        return flow.velocity(z, 0) + {}

    with pytest.raises(PluginError, match="plugin 'bad', sampler 'broken': TypeError"):
        WatchedSampler(broken, Ledger(), "plugin 'bad', sampler 'broken'")(Formula(turning), Z)


@pytest.mark.parametrize(("result", "shown"), [(None, "None"), (torch.zeros(3), r"\[3\]")])
def test_a_sampler_that_returns_something_else_is_blamed(result, shown):
    with pytest.raises(PluginError, match=rf"sampler: returned {shown}, expected .*\[1, 2, 3, 2, 2\]"):
        WatchedSampler(lambda flow, z, i=0, memory=None: result, Ledger())(Formula(turning), Z)


@pytest.mark.parametrize("where", ["velocity", "step_done"])
def test_what_the_model_raises_is_not_blamed_on_the_sampler(where):
    error = OSError("the disk is gone")

    def fail(*arguments):
        raise error

    flow = Formula(turning)
    setattr(flow, where, fail)
    with pytest.raises(OSError) as caught:
        WatchedSampler(euler, Ledger())(flow, Z)
    assert caught.value is error


def steps(flow, z, i=0, memory=None, change=lambda z: z, remember=lambda z: None):
    """Euler, what it makes of each step and remembers of it changed."""
    for step in range(i, len(flow.times)):
        z = change(flow.advance(z, flow.velocity(z, step), step, step + 1))
        flow.step_done(step, z, remember(z))
    return z


WRONG = {
    "never reports a step": (
        lambda flow, z, i=0, memory=None: flow.advance(z, flow.velocity(z, 0), 0, len(flow.times)),
        "returned without having called flow.step_done",
    ),
    "makes NaN in a step": (
        partial(steps, change=lambda z: z * float("nan")),
        r"reports step 1 with a sample of which 24 of 24 numbers are not finite, the first, nan, at \[0, 0",
    ),
    "returns NaN": (
        lambda flow, z, i=0, memory=None: steps(flow, z) * float("inf"),
        "returned a sample of which 24 of 24 numbers are not finite",
    ),
    "returns another dtype": (
        lambda flow, z, i=0, memory=None: steps(flow, z).double(),
        r"returned a tensor of torch.float64, expected torch.float32",
    ),
    "keeps text in memory": (
        partial(steps, remember=lambda z: {"notes": ["a", z]}),
        "memory.notes.0 is str; what is to be saved must be tensors and numbers",
    ),
    "asks beyond the end": (
        lambda flow, z, i=0, memory=None: flow.velocity(z, len(flow.times)),
        "asks for the velocity at index 30; there are 0 to 29",
    ),
    "goes backwards": (
        lambda flow, z, i=0, memory=None: flow.advance(z, flow.velocity(z, 3), 3, 2),
        "advances from index 3 to 2",
    ),
    "exits": (lambda flow, z, i=0, memory=None: sys.exit(0), "SystemExit: 0"),
}


@pytest.mark.parametrize(("sampler", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_a_sampler_does_wrongly_is_named_when_it_happens(sampler, said):
    with pytest.raises(PluginError, match=f"plugin 'bad': {said}"):
        WatchedSampler(sampler, Ledger(), "plugin 'bad'")(Formula(turning), Z)


def test_a_model_that_overflows_is_told_of_by_its_step_and_not_blamed_on_the_sampler():
    told = []
    flow = Formula(lambda z, t: torch.full_like(z, float("inf")) if t < 0.5 else torch.ones_like(z), n=4)
    out = WatchedSampler(euler, Ledger(), "euler", told.append)(flow, Z)
    assert not out.isfinite().all()
    assert told[0].startswith("what the model gives in step 4 of 4: 24 of 24 numbers are not finite")
    with pytest.raises(NonFiniteError, match=r"step 4 of 4: .* inf, at .*--allow-nonfinite"):
        WatchedSampler(euler, Ledger(), "euler", Finite().refuse)(flow, Z)
