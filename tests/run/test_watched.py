"""A sampler watched from outside: nothing it computes is changed, what it does is noted, errors are named."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from blockstream_lpl import LinearProportionalLeap

from blockstream.engine.ledger import Ledger
from blockstream.errors import NonFiniteError, PluginError
from blockstream.plugins.euler import sample as euler
from blockstream.report.sampling import samplings
from blockstream.run.finite import Finite
from blockstream.run.watched import WatchedSampler, cosine
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
        for step in range(2):
            v = flow.velocity(z, step)
            z = flow.advance(z, v, step, step + 1)
            v.zero_()
            flow.step_done(step, z, None)
        return z

    ledger = Ledger()
    WatchedSampler(in_place, ledger)(Formula(lambda z, t: torch.ones_like(z), n=2), Z)
    assert samplings(ledger.notes)[0].cosine[1] == pytest.approx(1.0)


def test_the_cosine_of_nothing_is_none():
    assert cosine(torch.zeros(3), torch.ones(3)) is None
    assert cosine(torch.full((3,), float("inf")), torch.ones(3)) is None
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)


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


def steps(flow, z, i=0, memory=None, change=lambda z: z, remember=lambda z: None, off=0, of=None):
    """Euler, what it makes of each step, remembers of it and reports of it changed."""
    for step in range(i, of or len(flow.times)):
        z = change(flow.advance(z, flow.velocity(z, step), step, step + 1))
        flow.step_done(step + off, z, remember(z))
    return z


class Two:
    """Euler in the middle of each step: two velocities, declared as it is told."""

    def __init__(self, *declared):
        if declared:
            self.passes = lambda steps: declared[0]

    def __call__(self, flow, z, i=0, memory=None):
        ends = [*flow.times[1:], 0.0]
        for step in range(i, len(flow.times)):
            tried = flow.advance(z, flow.velocity(z, step), step, step + 1)
            middle = (flow.times[step] + ends[step]) / 2
            z = flow.advance(z, flow.velocity_at((z + tried) / 2, middle), step, step + 1)
            flow.step_done(step, z, None)
        return z


def says_left(n):
    def sampler(flow, z, i=0, memory=None):
        flow.velocity(z, 0)
        flow.remaining(n)
        return flow.velocity(z, 1)

    return sampler


def unreported(flow, z, i=0, memory=None):
    for step in range(len(flow.times)):
        z = flow.advance(z, flow.velocity(z, step), step, step + 1)
    return z


async def asynchronous(flow, z, i=0, memory=None):
    return z


def generator(flow, z, i=0, memory=None):
    yield z


def asking(t):
    return lambda flow, z, i=0, memory=None: flow.velocity_at(z, t)


NAN = float("nan")

WRONG = {
    "reports nothing in one leap": (
        lambda flow, z, i=0, memory=None: flow.advance(z, flow.velocity(z, 0), 0, len(flow.times)),
        "returned without having called flow.step_done for the steps from index 0 to 29",
    ),
    "never reports a step": (
        unreported,
        "went on from index 2 without having called flow.step_done since index 0",
    ),
    "returns at once": (lambda flow, z, i=0, memory=None: z, "returned without having called flow.step_done"),
    "stops half way": (partial(steps, of=15), "returned without .* from index 15 to 29; go to the end"),
    "reports another step": (
        partial(steps, off=1),
        r"reports step_done\(1\) after an advance to index 1; name the last index that was taken, 0",
    ),
    "reports a step again": (
        lambda flow, z, i=0, memory=None: [flow.step_done(3, z, None) for _ in range(2)],
        r"reports step_done\(3\); the indices left are 4 to 29",
    ),
    "reports a step that is none": (
        lambda flow, z, i=0, memory=None: flow.step_done(30, z, None),
        r"reports step_done\(30\); the indices left are 0 to 29",
    ),
    "makes NaN in a step": (
        partial(steps, change=lambda z: z * NAN),
        r"reports step 1 with a sample of which 24 of 24 numbers are not finite, the first, nan, at \[0, 0",
    ),
    "hands on NaN": (
        lambda flow, z, i=0, memory=None: flow.velocity(z * NAN, 0),
        "came to index 0 with a sample of which 24 of 24",
    ),
    "returns NaN": (
        lambda flow, z, i=0, memory=None: steps(flow, z) * float("inf"),
        "returned a sample of which 24 of 24 numbers are not finite",
    ),
    "returns another dtype": (
        lambda flow, z, i=0, memory=None: steps(flow, z).double(),
        r"returned a tensor of torch.float64, expected torch.float32",
    ),
    "returns a list": (
        lambda flow, z, i=0, memory=None: [steps(flow, z)],
        r"returned \[tensor.*expected a tensor of shape",
    ),
    "reports another shape": (
        partial(steps, change=lambda z: z[:, :1]),
        r"reports step 1 with \[1, 1, 3, 2, 2\], expected a tensor of shape \[1, 2, 3, 2, 2\]",
    ),
    "asks with another shape": (
        lambda flow, z, i=0, memory=None: flow.velocity(z[0], 0),
        r"comes to index 0 with \[2, 3, 2, 2\], expected",
    ),
    "advances along a number": (
        lambda flow, z, i=0, memory=None: flow.advance(z, 1.0, 0, 1),
        r"advances along 1.0, expected a tensor of shape",
    ),
    "keeps text in memory": (
        partial(steps, remember=lambda z: {"notes": ["a", z]}),
        "memory.notes.0 is str; what is to be saved must be tensors and numbers",
    ),
    "keeps numbers as keys": (partial(steps, remember=lambda z: {1: z}), "memory has the key 1"),
    "remembers a tensor alone": (
        partial(steps, remember=lambda z: z),
        "reports step 1 with memory Tensor; expected a mapping or None",
    ),
    "asks beyond the end": (
        lambda flow, z, i=0, memory=None: flow.velocity(z, len(flow.times)),
        "asks for the velocity at index 30; there are 0 to 29",
    ),
    "asks at a time for an index": (
        lambda flow, z, i=0, memory=None: flow.velocity(z, 0.5),
        "asks for the velocity at index 0.5",
    ),
    "asks before the beginning": (asking(1.01), "asks for the velocity at time 1.01; times go from 1 to 0"),
    "asks past the end": (asking(-1e-3), "asks for the velocity at time -0.001; times go from 1 to 0"),
    "asks at no time": (asking(NAN), "asks for the velocity at time nan"),
    "asks at a tensor": (asking(Z), "asks for the velocity at time tensor"),
    "goes backwards": (
        lambda flow, z, i=0, memory=None: flow.advance(z, flow.velocity(z, 3), 3, 2),
        "advances from index 3 to 2",
    ),
    "goes past the last one it told of": (says_left(0), r"asks for a velocity after flow.remaining\(0\)"),
    "says less than nothing follows": (says_left(-1), "says that -1 more velocities follow"),
    "says half of one follows": (says_left(0.5), "says that 0.5 more velocities follow"),
    "makes more passes than one a step": (
        Two(),
        "asks for more than 30 velocities, .* 30 steps",
    ),
    "makes more passes than it declares": (Two((1, 59)), "asks for more than 59 velocities"),
    "declares no numbers": (Two("many"), r"passes\(30\) returned 'many'; expected \(least, most\)"),
    "declares one number": (Two(60), r"passes\(30\) returned 60"),
    "declares the most first": (Two((60, 30)), r"passes\(30\) returned \(60, 30\)"),
    "takes no index": (lambda flow, z: z, "TypeError: .* takes 2 positional arguments but 4 were given"),
    "is a generator": (generator, "returned <generator ob"),
    "is asynchronous": (asynchronous, "returned <coroutine ob"),
    "exits": (lambda flow, z, i=0, memory=None: sys.exit(0), "SystemExit: 0"),
}


@pytest.mark.parametrize(("sampler", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_a_sampler_does_wrongly_is_named_when_it_happens(sampler, said):
    with pytest.raises(PluginError, match=f"plugin 'bad': {said}"):
        WatchedSampler(sampler, Ledger(), "plugin 'bad'")(Formula(turning), Z)


def test_a_model_that_overflows_is_told_of_by_its_step_and_not_blamed_on_the_sampler():
    told = []
    flow = Formula(lambda z, t: torch.full_like(z, float("inf")) if t < 0.5 else torch.ones_like(z), n=4)
    out = WatchedSampler(euler, Ledger(), "euler", lambda said, again: told.append(said))(flow, Z)
    assert not out.isfinite().all()
    assert told[0].startswith("what the model gives in step 4 of 4: 24 of 24 numbers are not finite")
    with pytest.raises(NonFiniteError, match=r"step 4 of 4: .* inf, at .*--allow-nonfinite"):
        WatchedSampler(euler, Ledger(), "euler", Finite().refuse)(flow, Z)


class Midpoint(Two):
    """Two passes a step, declared; says what its last memory was."""

    def passes(self, steps):
        return 2 * steps, 2 * steps


def test_a_sampler_of_several_passes_a_step_is_noted_by_steps_and_by_passes():
    ledger, flow = Ledger(), Formula(bending, n=6)
    WatchedSampler(Midpoint(), ledger)(flow, Z)
    (steps,) = samplings(ledger.notes)
    assert (steps.indices, steps.passes, steps.leaps) == (tuple(range(6)), 12, ())
    assert len(flow.asked) == 12 and flow.asked[1] == pytest.approx(11 / 12)


def test_both_ends_of_the_times_may_be_asked_for():
    def ends(flow, z, i=0, memory=None):
        assert torch.equal(flow.velocity_at(z, 1.0), flow.velocity(z, 0))
        flow.velocity_at(z, 0)
        return steps(flow, z)

    ends.passes = lambda n: (n + 3, n + 3)
    WatchedSampler(ends, Ledger())(Formula(bending), Z)


def test_a_flow_of_its_own_times_alone_is_said_to_be_one():
    class Own(Formula):
        def __getattribute__(self, name):
            if name == "velocity_at":
                raise AttributeError(name)
            return super().__getattribute__(name)

    assert torch.equal(
        WatchedSampler(lambda flow, z, i=0, memory=None: steps(flow, z), Ledger())(Own(bending), Z),
        euler(Formula(bending), Z),
    )
    with pytest.raises(PluginError, match=r"plugin 'bad': AttributeError: the flow has no velocity_at"):
        WatchedSampler(Midpoint(), Ledger(), "plugin 'bad'")(Own(bending), Z)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("fine", r"report\(\) returned 'fine', expected a mapping"),
        ({"a": Z}, r"report\(\) returned what JSON cannot hold: .*Tensor"),
    ],
)
def test_a_report_that_is_none_is_named(said, wrong):
    def sampler(flow, z, i=0, memory=None):
        return z

    assert WatchedSampler(sampler, Ledger()).report({}, 3) == {}
    sampler.report = lambda memory, steps: said
    with pytest.raises(PluginError, match=f"plugin 'bad': {wrong}"):
        WatchedSampler(sampler, Ledger(), "plugin 'bad'").report({}, 3)
    sampler.report = lambda memory, steps: memory["missing"]
    with pytest.raises(PluginError, match=r"plugin 'bad': report\(\): KeyError: 'missing'"):
        WatchedSampler(sampler, Ledger(), "plugin 'bad'").report({}, 3)


def test_a_resumed_sampler_may_make_the_passes_that_are_left_and_no_more():
    class Resumed(Formula):
        passes_made = 6

    flow = Resumed(bending, n=6)
    WatchedSampler(Midpoint(), Ledger())(flow, Z, 3)
    assert len(flow.asked) == 6
    flow.passes_made = 7
    with pytest.raises(PluginError, match="asks for more than 12 velocities"):
        WatchedSampler(Midpoint(), Ledger())(flow, Z, 3)
