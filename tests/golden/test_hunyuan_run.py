import re

import pytest
import torch

from blockstream.plugins.euler import sample
from movd.hunyuan.denoiser import hunyuan_denoiser
from movd.hunyuan.guided import HunyuanFlow, Prompt, shifted_times
from movd.official import load_official

pytestmark = pytest.mark.golden
FOLDER = "hunyuan_run_tiny"


@pytest.fixture(scope="module")
def model(golden):
    model = hunyuan_denoiser(golden.meta["config"])
    load_official(model, golden.weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("table", ["shift7_50", "shift5_50", "shift7_30", "shift17_6"])
def test_the_tables_of_times_equal_the_originals(golden, table):
    shift, steps = (int(n) for n in re.fullmatch(r"shift(\d+)_(\d+)", table).groups())
    want, times = golden.expected(f"sched.{table}"), shifted_times(steps, float(shift))
    torch.testing.assert_close(times, want["sigmas"], atol=1e-7, rtol=0)
    torch.testing.assert_close(times[:-1] * 1000, want["timesteps"], atol=1e-4, rtol=0)


class Recorded(HunyuanFlow):
    """A flow that notes what the model says."""

    said, after = (), ()

    def _pass(self, z, t, prompt):
        v = super()._pass(z, t, prompt)
        self.said = (*self.said, v)
        return v

    def step_done(self, i, z, memory):
        self.after = (*self.after, z)


@pytest.mark.parametrize("case", ["guide6_shift7", "batch2_shift5", "true_cfg"])
def test_every_pass_and_step_equal_the_originals(model, golden, case):
    given, want, s = golden.given(case), golden.expected(case), golden.meta["cases"][case]
    negative = None
    if "true_cfg" in s:
        negative = Prompt(given["neg_prompt_embeds"], given["neg_mask"], given["neg_pooled"])
    flow = Recorded(
        model,
        Prompt(given["prompt_embeds"], given["mask"], given["pooled"]),
        s["steps"],
        shift=s["shift"],
        guidance=s["guidance"],
        negative=negative,
        true_guidance=s.get("true_cfg", 1.0),
    )
    torch.testing.assert_close(flow.guidance, want["guidance"])
    torch.testing.assert_close(flow.timesteps, want["timesteps"], atol=1e-4, rtol=0)
    final = sample(flow, given["latents"])
    golden.close(torch.stack(flow.said[:: flow.passes_a_step]), want["velocity"], "velocity")
    if negative is not None:
        assert flow.passes_a_step == 2
        golden.close(torch.stack(flow.said[1::2]), want["neg_velocity"], "neg_velocity")
    golden.close(torch.stack(flow.after), want["latents_by_step"], "latents_by_step")
    assert torch.equal(final, flow.after[-1])
