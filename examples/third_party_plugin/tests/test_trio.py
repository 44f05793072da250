"""The plugin as blockstream finds it once it is installed, and what it does."""

from types import SimpleNamespace

import pytest
from blockstream_trio.ab2 import sample

from blockstream.plan.segments import Segment, Stage
from blockstream.plugins import Plugins
from blockstream.run.files import Files


@pytest.fixture
def plugins():
    plugins = Plugins()
    plugins.load("trio")
    return plugins


class Flow:
    """v(t) = 6 t^2 at times 1, 1 - 1/n, ...: from 0 at t = 1 to 2 at t = 0. Samples are plain numbers."""

    straight = True

    def __init__(self, n):
        self.times = [1 - i / n for i in range(n)]
        self.done = []

    def velocity(self, z, i):
        return 6 * self.times[i] ** 2

    def advance(self, z, v, i, to):
        ahead = self.times[to] if to < len(self.times) else 0.0
        return z + v * (self.times[i] - ahead)

    def remaining(self, n):
        self.left = n

    def step_done(self, i, z, memory):
        self.done.append((i, z, memory))


def test_twice_the_steps_leave_a_quarter_of_the_error():
    coarse, fine = (abs(sample(Flow(n), 0.0) - 2) for n in (20, 40))
    assert 3.5 < coarse / fine < 4.5


def test_a_run_resumes_after_any_step():
    flow = Flow(6)
    end = sample(flow, 0.0)
    assert flow.left == 0
    for i, z, memory in flow.done:
        assert sample(Flow(6), z, i + 1, memory) == end


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
