"""At equal passes LPL ends nearer to all the steps than fewer steps do, plain or of second order."""

import pytest
import torch
from blockstream_lpl import sample

from benchmarks.lpl_toy import decibels
from benchmarks.rivals import ab2, euler_steps
from benchmarks.toy_flows import Mixture, MixtureFlow
from blockstream.plugins import euler


@pytest.mark.parametrize("shift", [0.48, 2.42, 6.0])
@pytest.mark.parametrize("guidance", [3.0, 7.0])
def test_lpl_is_nearer_to_all_the_steps_than_its_rivals_in_as_many_passes(shift, guidance):
    mixture = Mixture("", shift=shift, guidance=guidance)
    noise, prompts = mixture.noise(6), mixture.prompts(6)
    full = euler.sample(MixtureFlow(mixture, prompts, 30), noise)
    near: dict[str, list[float]] = {"lpl": [], "euler": [], "ab2": []}
    taken = []
    for s in range(6):
        z, prompt = noise[s : s + 1], prompts[s : s + 1]
        flow = MixtureFlow(mixture, prompt, 30)
        near["lpl"].append(decibels(sample(flow, z)[0], full[s]))
        taken.append(flow.passes)
        for name, rival in (("euler", euler_steps), ("ab2", ab2)):
            got = rival(MixtureFlow(mixture, prompt, flow.passes), z)[0]
            near[name].append(decibels(got, full[s]))
    lpl, plain, second = (torch.tensor(near[name]) for name in near)
    assert max(taken) < 24
    assert lpl.min() > 30
    assert lpl.median() > plain.median() + 5
    assert lpl.median() > second.median()


def test_a_mixture_flows_velocity_is_the_mean_of_data_minus_noise():
    """By brute force: of many pairs of data and noise, those whose blend is near z."""
    mixture = Mixture("", size=2, components=3, named=2, directions=2, guidance=1.0, spread=0.3)
    gen = torch.Generator().manual_seed(3)
    count, t, prompt = 500_000, 0.6, torch.tensor([[0, 1]])
    which = torch.randint(2, (count,), generator=gen)
    data = mixture.means[which] + 0.3 * torch.randn(count, 2, generator=gen, dtype=torch.float64)
    noise = torch.randn(count, 2, generator=gen, dtype=torch.float64)
    blend = (1 - t) * data + t * noise
    z = blend[:1]
    near = (blend - z).norm(dim=1) < 0.05
    want = (data - noise)[near].mean(0)
    torch.testing.assert_close(mixture.velocity(z, t, prompt)[0], want, atol=0.06, rtol=0)
