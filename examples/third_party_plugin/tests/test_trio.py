"""The plugin as blockstream finds it once it is installed, and what it does."""

import math
from types import SimpleNamespace

import pytest
import torch
from blockstream_trio.ab2 import sample
from blockstream_trio.heun import Heun

from blockstream.plan.segments import Segment, Stage
from blockstream.plugins import Plugins
from blockstream.run.files import Files


@pytest.fixture
def plugins():
    plugins = Plugins()
    plugins.load("trio")
    return plugins


class Flow:
    """dz/dt = -v along which z has a known end, at times 1, 1 - 1/n, ..."""

    straight = True

    def __init__(self, formula, n):
        self.formula, self.times = formula, [1 - i / n for i in range(n)]
        self.asked, self.done = 0, []

    def velocity(self, z, i):
        return self.velocity_at(z, self.times[i])

    def velocity_at(self, z, t):
        self.asked += 1
        return self.formula(z, t)

    def advance(self, z, v, i, to):
        ahead = self.times[to] if to < len(self.times) else 0.0
        return z + v * (self.times[i] - ahead)

    def remaining(self, n):
        self.left = n

    def step_done(self, i, z, memory):
        self.done.append((i, z, memory))


def sample_of(value):
    return torch.tensor(value, dtype=torch.float64)


#: A velocity, where it leads from z at t = 1 to t = 0.
KNOWN = {
    "of time": (lambda z, t: 0 * z + 6 * t**2, 0.0, 2.0),
    "of the sample": (lambda z, t: z, 1.0, math.e),
    "of both": (lambda z, t: -2 * (1 - t) * z, 1.0, 1 / math.e),
}


@pytest.mark.parametrize("sampler", [sample, Heun()], ids=["ab2", "heun"])
@pytest.mark.parametrize(("formula", "begin", "end"), KNOWN.values(), ids=KNOWN)
def test_twice_the_steps_leave_a_quarter_of_the_error(sampler, formula, begin, end):
    coarse, fine = (abs(float(sampler(Flow(formula, n), sample_of(begin))) - end) for n in (40, 80))
    assert fine < 1e-3
    assert 3.6 < coarse / fine < 4.4


@pytest.mark.parametrize("sampler", [sample, Heun()], ids=["ab2", "heun"])
def test_a_run_resumes_after_any_step(sampler):
    formula = KNOWN["of both"][0]
    flow = Flow(formula, 6)
    end = sampler(flow, sample_of(1.0))
    assert flow.left == 0
    for i, z, memory in flow.done:
        assert sampler(Flow(formula, 6), z, i + 1, memory) == end


def test_heun_declares_the_passes_that_it_makes():
    flow = Flow(KNOWN["of time"][0], 7)
    Heun()(flow, sample_of(0.0))
    assert Heun().passes(7) == (flow.asked, flow.asked)
    assert Heun().report(flow.done[-1][2], 7) == {"last_bend": pytest.approx(6 / 49)}


def test_every_nth_segment_stays_while_there_is_room(plugins):
    choice = plugins.offers("policy", "trio")["every"]
    stage = Stage("dit", tuple(Segment(name, 10) for name in "abcdefg"))
    (policy,) = choice.build(choice.options(nth=3))
    assert [list(policy.retain(stage, room)) for room in (5, 10, 25, 99)] == [[], [0], [0, 3], [0, 3, 6]]


def test_reads_are_counted_and_written(plugins, tmp_path):
    run = SimpleNamespace(files=Files(tmp_path))
    run.files.begin({}, {})
    plugins.hook.run_started(run=run)
    for _ in range(2):
        plugins.hook.segment_loaded(span=SimpleNamespace(label="dit.block.0", nbytes=100, seconds=0.25))
    plugins.hook.run_finished(run=run, report={})
    assert (tmp_path / "reads.csv").read_text().splitlines()[1] == "dit.block.0,2,200,0.500000"
