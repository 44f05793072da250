from blockstream.plugins.euler import sample


class Line:
    """A flow of plain numbers: the velocity is known, and every call is noted."""

    times = (1.0, 0.7, 0.2)
    straight = True

    def __init__(self):
        self.calls = []

    def velocity(self, z, i):
        self.calls.append(("velocity", i))
        return 2.0

    def advance(self, z, v, i, to):
        times = (*self.times, 0.0)
        return z + v * (times[i] - times[to])

    def remaining(self, n):
        self.calls.append(("remaining", n))

    def step_done(self, i, z, memory):
        assert memory is None
        self.calls.append(("done", i, round(z, 6)))


def test_steps_follow_the_flows_times_to_the_end():
    flow = Line()
    assert round(sample(flow, 1.0), 6) == 3.0
    done = [call[1:] for call in flow.calls if call[0] == "done"]
    assert done == [(0, 1.6), (1, 2.6), (2, 3.0)]


def test_the_flow_knows_what_is_left_after_each_velocity():
    flow = Line()
    sample(flow, 0.0, 1)
    assert [call[:2] for call in flow.calls] == [
        ("velocity", 1),
        ("remaining", 1),
        ("done", 1),
        ("velocity", 2),
        ("remaining", 0),
        ("done", 2),
    ]


def test_a_run_that_was_done_returns_its_sample():
    flow = Line()
    assert sample(flow, 5.0, 3) == 5.0
    assert flow.calls == []
