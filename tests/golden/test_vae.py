import json

import pytest
import torch

from movd.official import load_official
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig

pytestmark = pytest.mark.golden
FOLDER = "opensora_vae_tiny"
ENCODES = ["encode_T34", "encode_T25", "encode_T1"]
DECODES = ["decode_T34", "decode_T26", "decode_T51", "decode_T1"]


@pytest.fixture(scope="module")
def vae(golden):
    model = OpenSoraVAE(OpenSoraVAEConfig(**golden.meta["config"]))
    load_official(model, golden.weights)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("case", ENCODES)
def test_encoding_at_the_posteriors_means_equals_the_original(vae, golden, case):
    x, want = golden.given(case)["x"], golden.expected(case)
    golden.close(vae.encode_frames(x, sample=False), want["x_z_mode"], "x_z")
    golden.close(vae.encode(x, sample=False), want["z_mode"], "z")


@pytest.mark.parametrize("case", ENCODES)
def test_encoding_with_given_draws_equals_the_original(vae, golden, case):
    given, want = golden.given(case), golden.expected(case)
    noise = given["noise_spatial"], given["noise_temporal"]
    golden.close(vae.encode(given["x"], noise=noise), want["z_sampled"], "z")


@pytest.mark.parametrize("case", ENCODES)
def test_temporal_moments_equal_the_originals(vae, golden, case):
    want = golden.expected(case)
    chunks = want["x_z_mode"].split(vae.config.micro_frame_size, dim=2)
    means, logvars = zip(*(vae.temporal_vae.moments(chunk) for chunk in chunks), strict=True)
    golden.close(torch.cat(means, 2), want["temporal_mean"], "mean")
    golden.close(torch.cat(logvars, 2), want["temporal_logvar"], "logvar")


@pytest.mark.parametrize("case", DECODES)
def test_decoding_equals_the_original(vae, golden, case):
    given, want = golden.given(case), golden.expected(case)
    n = int(given["num_frames"])
    between = []
    original = vae.decode_frames
    vae.decode_frames = lambda x_z: between.append(x_z) or original(x_z)
    try:
        x = vae.decode(given["z"], n)
    finally:
        del vae.decode_frames
    golden.close(torch.cat(between, 2), want["x_z"], "x_z")
    golden.close(x, want["x"], "x")


def test_the_temporal_decoders_layers_equal_the_originals(vae, golden):
    want = golden.expected("decode_T34.chunk0")
    seen, hooks = {}, []
    for name in want:
        module = vae.temporal_vae.get_submodule(name)
        parts = list(module) if isinstance(module, torch.nn.ModuleList) else [module]
        hooks += [p.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y})) for p in parts]
    z = golden.given("decode_T34")["z"][:, :, :5]
    vae.temporal_vae.decode(z * vae.scale + vae.shift, 17)
    for hook in hooks:
        hook.remove()
    for name in want.keys() & seen.keys():
        golden.close(seen[name], want[name], name)
    assert want.keys() - seen.keys() <= {"decoder.conv_blocks.0"}  # an identity there: not called


def test_latent_frames_agree_with_the_originals_table(golden):
    config = OpenSoraVAEConfig(**golden.meta["config"])
    for size, latent in golden.meta["latent_size_table"].items():
        frames, height, width = json.loads(size)
        assert config.latent_frames(frames) == latent[0]
        assert [height // config.space_factor, width // config.space_factor] == latent[1:]
