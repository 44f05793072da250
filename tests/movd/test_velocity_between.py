"""Velocities between the times of a flow, and at its end: the model is told the time that it is."""

from types import SimpleNamespace

import pytest
import torch

from movd.hunyuan.guided import HunyuanFlow, Prompt
from movd.pyramid.legs import StageFlow, Words
from movd.pyramid.stages import make_stages


class Told:
    """A model that notes the time it is told, of either family."""

    def __init__(self):
        self.times = []
        self.x_embedder = SimpleNamespace(proj=SimpleNamespace(weight=torch.zeros(1, dtype=torch.float32)))

    def __call__(self, clips=None, t=None, *words, hidden_states=None, timestep=None, **given):
        self.times.append(float((t if timestep is None else timestep)[0]))
        z = clips[-1] if hidden_states is None else hidden_states
        return z * self.times[-1] if hidden_states is None else (z * self.times[-1],)


def hunyuan(model, **more):
    prompt = Prompt(torch.zeros(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 3))
    return HunyuanFlow(model, prompt, 4, **more)


def pyramid(model, stage=1):
    words = Words(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    return StageFlow(model, words, [], make_stages()[stage], 4, None)


@pytest.mark.parametrize("make", [hunyuan, lambda model: hunyuan(model, rounded=True), pyramid])
def test_at_a_time_of_the_flow_it_is_the_velocity_of_its_index(make):
    model, z = Told(), torch.ones(1, 2, 1, 4, 4)
    flow = make(model)
    for i, t in enumerate(flow.times):
        assert torch.equal(flow.velocity_at(z, t), flow.velocity(z, i))
        assert model.times[-1] == model.times[-2]


def test_hunyuan_is_told_a_thousand_times_the_time():
    model, z = Told(), torch.ones(1, 2, 1, 4, 4)
    for t in (0.75, 0.5, 0.0):
        hunyuan(model).velocity_at(z, t)
        assert model.times[-1] == 1000 * t


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pyramid_goes_evenly_from_a_stages_first_time_over_its_last_to_its_end(stage):
    model, z = Told(), torch.ones(1, 2, 1, 4, 4)
    flow, at = pyramid(model, stage), make_stages()[stage]
    for t, told in ((1.0, at.first), (0.001, at.last), (0.5005, (at.first + at.last) / 2)):
        flow.velocity_at(z, t)
        assert model.times[-1] == pytest.approx(told, abs=1e-3)
    flow.velocity_at(z, 0.0)
    assert at.last - model.times[-1] == pytest.approx((at.first - at.last) / 999, abs=1e-3)
