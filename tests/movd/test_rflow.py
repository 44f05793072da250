import math

import pytest
import torch

from blockstream.errors import ConfigError
from blockstream.plugins import new_run
from blockstream.plugins.euler import sample
from movd.rflow import IMAGE_FPS, OpenSoraFlow, check_frames, timesteps, transform_times
from tests.support import movd_tiny as tiny

SIZE = {"height": 40, "width": 32, "frames": 51, "fps": 24}


class Spy(torch.nn.Module):
    """A model whose velocity is the text's mean; it notes what it is given."""

    def __init__(self):
        super().__init__()
        self.y_embedder = torch.nn.Module()
        self.y_embedder.y_embedding = torch.zeros(6, 8)
        self.calls = []

    def forward(self, x, timestep, y, **given):
        self.calls.append({"x": x, "timestep": timestep, "y": y, **given})
        v = y.mean(dim=(1, 2, 3))[:, None, None, None, None].expand_as(x)
        return torch.cat((v, torch.full_like(v, 99.0)), 1)


def flow_of(model, steps=4, guidance=3.0, **more):
    y = tiny.noise(1, 1, 6, 8, key=3) + 1
    return OpenSoraFlow(model, y, torch.ones(1, 6), steps, guidance, **{**SIZE, **more})


def test_guidance_weighs_prompt_against_the_models_own_null_caption():
    model = Spy()
    z = tiny.noise(1, 4, 3, 5, 4)
    flow = flow_of(model)
    v = flow.velocity(z, 1)
    torch.testing.assert_close(v, 3.0 * flow.y[:1].mean().expand_as(z))
    [call] = model.calls
    assert call["x"].shape[0] == call["timestep"].shape[0] == call["y"].shape[0] == 2
    assert torch.equal(call["timestep"], flow.timesteps[1].expand(2))
    assert call["x_mask"] is None


def test_euler_reaches_the_data_in_one_pass_a_time():
    model = Spy()
    z = tiny.noise(1, 4, 3, 5, 4)
    seen, left = [], []
    flow = flow_of(model, on_step=lambda i, z, memory: seen.append(i), on_remaining=left.append)
    final = sample(flow, z)
    torch.testing.assert_close(final, z + 3.0 * flow.y[:1].mean())  # the whole way from 1 to 0
    assert seen == [0, 1, 2, 3]
    assert left == [3, 2, 1, 0]
    assert len(model.calls) == 4


def test_a_run_goes_on_from_any_step():
    z, halves = tiny.noise(1, 4, 3, 5, 4), {}
    whole = sample(flow_of(Spy(), on_step=lambda i, z, memory: halves.update({i: z})), z)
    assert torch.equal(sample(flow_of(Spy()), halves[1], 2), whole)


def test_a_step_that_cancels_ends_the_loop():
    model = Spy()

    def cancel(i, z, memory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(flow_of(model, on_step=cancel), tiny.noise(1, 4, 3, 5, 4))
    assert len(model.calls) == 1


def test_known_frames_stay_and_the_model_is_told():
    model = Spy()
    z = tiny.noise(1, 4, 3, 5, 4)
    flow = flow_of(model, x_mask=torch.tensor([0.0, 1.0, 1.0]))
    final = sample(flow, z)
    assert torch.equal(final[:, :, 0], z[:, :, 0])
    assert not torch.equal(final[:, :, 1], z[:, :, 1])
    assert model.calls[0]["x_mask"].tolist() == [[False, True, True]] * 2


def test_noise_of_late_frames_resumes_bit_for_bit():
    def run(i=0, z=None, state=None, seed=3):
        saved = {}
        flow = flow_of(
            Spy(),
            x_mask=torch.tensor([[0.0, 0.5, 0.9]]),
            steps=8,
            generator=torch.Generator().manual_seed(seed),
            transform=False,
            on_step=lambda i, z, memory: saved.update({i: (z, flow.state())}),
        )
        if state is not None:
            flow.load_state(state)
        return sample(flow, tiny.noise(1, 4, 3, 5, 4) if z is None else z, i), saved

    whole, saved = run()
    for i, (z, state) in saved.items():
        again, _ = run(i + 1, z, state, seed=4)
        assert torch.equal(again, whole)
    assert not torch.equal(run(seed=4)[0], whole)
    assert not torch.equal(saved[0][0], saved[1][0])  # the third frame has been given its noise


@pytest.mark.parametrize("frames", range(2, 17))
def test_two_to_sixteen_frames_are_refused_with_the_reason_and_the_nearest_counts(frames):
    with pytest.raises(ConfigError, match=r"frames // 17 \* 5.* NaN .*1 and 17"):
        check_frames(frames)
    with pytest.raises(ConfigError):
        timesteps(3, 240, 426, frames)


@pytest.mark.parametrize("frames", [1, 17, 20, 204])
def test_other_counts_have_finite_decreasing_times(frames):
    times = timesteps(30, 240, 426, frames)
    assert times[0] == 1000
    assert torch.isfinite(times).all()
    assert (times.diff() < 0).all()


def test_nothing_to_sample_is_refused():
    with pytest.raises(ConfigError, match="steps = 0"):
        timesteps(0, 240, 426, 51)
    with pytest.raises(ConfigError, match="frames = 0"):
        check_frames(0)


def test_the_transform_moves_times_by_size_and_length():
    t = torch.tensor([500.0])
    r = math.sqrt(256 * 256 / 512**2) * math.sqrt(20)
    want = 1000 * r * 0.5 / (1 + (r - 1) * 0.5)
    assert transform_times(t, 256, 256, 68).item() == pytest.approx(want, rel=1e-6)
    assert transform_times(t, 512, 512, 1).item() == pytest.approx(500.0)


def test_a_still_image_tells_the_model_the_originals_rate():
    model = Spy()
    flow_of(model, frames=1).velocity(tiny.noise(1, 4, 1, 5, 4), 0)
    assert model.calls[0]["fps"].tolist() == [IMAGE_FPS] == [120.0]


def test_sizes_in_bfloat16_reach_times_and_model_as_in_the_originals_script():
    model = Spy()
    flow = flow_of(model, width=855, size_dtype=torch.bfloat16)
    flow.velocity(tiny.noise(1, 4, 3, 5, 4), 0)
    assert model.calls[0]["width"].tolist() == [856.0]
    assert not torch.equal(flow.timesteps, flow_of(model, width=855).timesteps)


def test_the_flow_runs_the_real_model_with_guidance():
    dit = tiny.stdit3()
    inputs = tiny.dit_inputs(batch=1, lengths=(4,))
    flow = OpenSoraFlow(dit, inputs["y"], inputs["mask"], 2, 5.0, **SIZE)
    v = flow.velocity(inputs["x"], 0)
    t = {**inputs, "timestep": torch.tensor([1000.0])}
    cond = dit(**t)[:, :4]
    null = dit(**{**t, "y": dit.y_embedder.y_embedding[None, None]})[:, :4]
    torch.testing.assert_close(v, null + 5 * (cond - null), atol=1e-4, rtol=1e-4)


def test_text_of_another_length_than_the_null_caption_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 1, 5, 8\) and its null caption \(1, 1, 6, 8\)"):
        OpenSoraFlow(Spy(), tiny.noise(1, 1, 5, 8), None, 2, 1.0, **SIZE)


def test_the_step_is_told_to_the_run_that_is_in_progress():
    flow, z = flow_of(Spy(), steps=4), tiny.noise(1, 4, 3, 5, 4)
    with new_run() as run:
        flow.velocity(z, 2)
        assert (run.step, run.steps) == (2, 4)
        for t, step in ((flow.times[0], 0), (flow.times[1], 1), (flow.times[1] * 0.99, 1), (0.0, 3)):
            flow.velocity_at(z, t)
            assert run.step == step


def test_velocities_between_the_times_are_told_their_own_time_and_those_at_them_are_the_same():
    model = Spy()
    flow, z = flow_of(model, x_mask=torch.tensor([0.0, 0.5, 1.0])), tiny.noise(1, 4, 3, 5, 4)
    for i, t in enumerate(flow.times):
        assert torch.equal(flow.velocity_at(z, t), flow.velocity(z, i))
        at, index = model.calls[-2:]
        assert torch.equal(at["timestep"], index["timestep"])
        assert torch.equal(at["x_mask"], index["x_mask"])
    for t, on in ((0.75, [False, False, True]), (0.25, [False, True, True]), (0.0, [False, True, True])):
        v = flow.velocity_at(z, t)
        assert model.calls[-1]["timestep"].tolist() == [t * 1000] * 2
        assert model.calls[-1]["x_mask"].tolist() == [on] * 2
        assert [bool(frame.any()) for frame in v[0].unbind(1)] == on
