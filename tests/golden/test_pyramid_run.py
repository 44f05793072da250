"""The whole loop of Pyramidal Flow: every start, history, step and velocity, and the frames at the end."""

import pytest
import torch

from blockstream.plugins.euler import sample
from movd.official import load_official
from movd.pyramid.causal_vae import CausalVAEConfig, PyramidDecoder
from movd.pyramid.legs import Guidance, Journey, StageFlow, Words, normalised, unnormalised
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig
from movd.pyramid.stages import block_noise, make_stages
from movd.video import to_frames

pytestmark = pytest.mark.golden
FOLDER = "pyramid_run_tiny"
OWN = {"stages", "frame_per_unit", "stage_range", "gamma", "shift"}


@pytest.fixture(scope="module")
def model(golden):
    config = {k: v for k, v in golden.meta["config"].items() if k not in OWN and not k.startswith("vae_")}
    model = MiniFlux(MiniFluxConfig(**config)).eval()
    load_official(model, golden.weights)
    return model.requires_grad_(False)


class Given:
    """Block noise of the golden data in the place of the own draw."""

    def __init__(self, given, monkeypatch):
        self.given = given
        monkeypatch.setattr("movd.pyramid.stages.block_noise", lambda noise: noise)

    def __call__(self, unit, stage, shape):
        noise = self.given[f"u{unit}.s{stage}.block_noise"]
        assert noise.shape == shape
        return noise


@pytest.mark.parametrize("case", ["video5", "batch2", "linear", "noguide", "i2v", "e2e"])
def test_every_unit_stage_and_step_equals_the_original(model, golden, folder_of, monkeypatch, case):
    given, want, s = golden.given(case), golden.expected(case), golden.meta["cases"][case]
    guidance = Guidance(s["g"], s["vg"], s.get("linear", False))
    words = Words(given["prompt_embeds"], given["mask"], given["pooled"])
    if guidance.is_on:
        negative = Words(given["neg_prompt_embeds"], given["neg_mask"], given["neg_pooled"])
        words = negative.joined(words)
    image = None
    if "image_vae_latent" in given:
        image = normalised(given["image_vae_latent"])
    journey = Journey(
        given["noise"],
        make_stages(),
        steps_first=tuple(s.get("steps", (1, 1, 1))),
        steps_others=tuple(s["vsteps"]),
        image=image,
        fresh=Given(given, monkeypatch),
    )
    z, compared = None, set()

    def close(mine, name):
        compared.add(name)
        golden.close(mine, want[name], f"{case}.{name}")

    for leg in journey.legs:
        name = f"u{leg.unit}.s{leg.stage}"
        z = journey.begin(leg, z)
        if leg.stage == 0:
            close(z, f"u{leg.unit}.start")
        past = journey.past(leg)
        for j, clip in enumerate(past):
            close(clip, f"{name}.history.{j}")
        steps, said = [z], []
        stage = journey.stages[leg.stage]
        scale = guidance.scale(leg.unit) if guidance.is_on else None
        flow = StageFlow(model, words, past, stage, journey.steps(leg), scale)
        velocity = flow.velocity
        flow.velocity = lambda z, i, velocity=velocity, said=said: said.append(velocity(z, i)) or said[-1]
        flow.on_step = lambda i, z, memory, steps=steps: steps.append(z)
        z = sample(flow, z)
        journey.end(leg, z)
        close(torch.from_numpy(flow.timesteps), f"{name}.timesteps")
        close(torch.stack(said), f"{name}.velocity")
        close(torch.stack(steps), f"{name}.latents_by_step")
    close(journey.done, "latents")
    if s.get("decode"):
        vae = folder_of("pyramid_vae_tiny")
        decoder = PyramidDecoder(CausalVAEConfig(**vae.meta["config"])).eval().requires_grad_(False)
        load_official(decoder, {k: v for k, v in vae.weights.items() if k in decoder.state_dict()})
        latents = unnormalised(journey.done)
        close(latents, "vae_latents")
        x = torch.cat(list(decoder.decode_chunks(latents, 1)), 2)
        close(x, "decoded")
        frames = torch.from_numpy(to_frames(want["decoded"][0], truncate=True))
        assert torch.equal(frames, want["frames_uint8"].reshape(frames.shape))
        compared.add("frames_uint8")
    assert compared == {name for name in want if "history" not in name or name in compared}


def test_the_noise_of_a_jump_has_unit_variance_and_blocks_that_add_up_to_nothing():
    noise = block_noise(torch.randn(1, 4, 1, 64, 64, generator=torch.Generator().manual_seed(0)))
    sums = torch.nn.functional.avg_pool2d(noise[0, :, 0], 2)
    assert sums.abs().max() < 1e-6
    assert float(noise.var()) == pytest.approx(1, abs=0.03)
