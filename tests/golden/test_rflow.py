import re

import pytest
import torch

from blockstream.plugins.euler import sample
from movd.rflow import OpenSoraFlow, add_noise, timesteps, transform_times

pytestmark = pytest.mark.golden
FOLDER = "rflow"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def toy(z, t, y, mask=None, x_mask=None, **size):
    """The formula in the golden data's meta, with a second half that must be ignored."""
    c = y.mean(dim=(1, 2, 3))[:, None, None, None, None]
    v = -z + 0.1 * torch.sin(z + t[:, None, None, None, None] / 1000) + 0.05 * c
    return torch.cat((v, torch.full_like(v, 123.0)), 1)


def test_every_table_of_times_equals_the_original(golden):
    tables = golden.expected("timesteps")
    pattern = re.compile(r"N(\d+)_H(\d+)_W(\d+)_F(\d+)_disc(\d)_transform(\d)_(\w+)")
    assert len(tables) == 16
    for name, want in tables.items():
        n, h, w, f, discrete, transform, dtype = pattern.fullmatch(name).groups()
        got = timesteps(
            int(n),
            int(h),
            int(w),
            int(f),
            discrete=discrete == "1",
            transform=transform == "1",
            size_dtype=DTYPES[dtype],
        )
        atol = golden.meta["tolerance"]["timesteps"]["atol"]
        torch.testing.assert_close(got, want, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_the_time_transform_equals_the_original(golden):
    t = golden.given("transform")["t"]
    for name, want in golden.expected("transform").items():
        h, w, f = (int(part[1:]) for part in name.split("_"))
        golden.close(transform_times(t, h, w, f), want, name)


def test_adding_noise_equals_the_original(golden):
    given = golden.given("add_noise")
    golden.close(add_noise(**given), golden.expected("add_noise")["out"])


class Recorded(OpenSoraFlow):
    """A flow that notes what the model sees, and takes its noise from the golden data."""

    def __init__(self, *args, noise=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise, self.seen, self.on = noise, [], []

    def velocity(self, z, i):
        self.seen.append(z)
        if self.x_mask is not None:
            self.on.append(self.is_on(i))
        return super().velocity(z, i)

    def noise_like(self, z, i):
        return self.noise[i]


def flow_of(golden, case, **more):
    given, s = golden.given(case), golden.meta["cases"][case]
    return given["z"], Recorded(
        toy,
        given["y"],
        None,
        s["num_sampling_steps"],
        s["cfg_scale"],
        s["H"],
        s["W"],
        s["num_frames"],
        24,
        y_null=given["y_null"],
        discrete=s["use_discrete_timesteps"],
        transform=s["use_timestep_transform"],
        **more,
    )


@pytest.mark.parametrize("case", ["run_a", "run_b", "run_c"])
def test_euler_on_the_flow_equals_the_originals_sampler(golden, case):
    want = golden.expected(case)
    z, flow = flow_of(golden, case)
    final = sample(flow, z)
    torch.testing.assert_close(flow.timesteps, want["t"][:, 0].float(), atol=2e-4, rtol=0)
    golden.close(torch.stack([*flow.seen, final]), want["z_steps"], "z_steps")
    golden.close(final, want["final"], "final")


def test_the_frame_mask_equals_the_originals(golden):
    given, want = golden.given("run_mask"), golden.expected("run_mask")
    z, flow = flow_of(golden, "run_mask", x_mask=given["mask"], noise=given["noise_steps"])
    final = sample(flow, z)
    assert torch.equal(torch.stack(flow.on), want["x_mask_steps"])
    golden.close(torch.stack(flow.seen), want["z_in_steps"], "what the model sees")
    golden.close(final, want["final"], "final")
