"""When a sampling is saved: every so many steps, or once ten seconds of them would be lost."""

import pytest
import torch

from blockstream.plugins.euler import sample as euler
from blockstream.run.files import Files
from blockstream.run.steps import sample
from tests.support.flows import Formula, straight


@pytest.mark.parametrize(
    ("every", "a_step_s", "saved"),
    [
        (None, 0.05, []),
        (None, 4.0, [3, 6]),
        (None, 60.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 0.05, [3, 6]),
        (3, 4.0, [3, 6]),
        (5, 60.0, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_steps_are_saved_when_asked_or_when_much_would_be_lost(tmp_path, monkeypatch, every, a_step_s, saved):
    files, now, at = Files(tmp_path), [0.0], []
    files.declare([], ["0000"])
    files.begin({}, {})
    monkeypatch.setattr(files, "save", lambda name, tree: at.append(tree["index"]))
    flow = Formula(straight(torch.ones(2)), n=8)
    step_done = flow.step_done

    def slow(i, z, memory):
        now[0] += a_step_s
        step_done(i, z, memory)

    flow.step_done = slow
    sample(euler, files, "0000", flow, torch.zeros(2), every, clock=lambda: now[0])
    assert at == saved
