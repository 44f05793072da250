"""The training of the tiny families: losses fall, and what it writes is what the pipelines read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockstream.run.config import make_config
from examples.train_families import train_dit, train_vae
from examples.train_families.training import FRAMES
from examples.train_tiny import data
from tests.support.planned import Planned

TIME = {"hunyuan": 4, "pyramid": 8}
PIPELINES = {"hunyuan": "hunyuan-video", "pyramid": "pyramid-flow"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["hunyuan", "pyramid"])
def test_a_denoiser_learns_and_its_folder_is_read(family, tmp_path):
    scenes = torch.arange(8)
    shape = (8, train_vae.CHANNELS, (FRAMES - 1) // TIME[family] + 1, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    (tmp_path / family).mkdir()
    save_file({"latents": latents * 0.2, "scenes": scenes}, tmp_path / family / "latents.safetensors")
    argv = [
        family,
        "--work",
        str(tmp_path),
        "--device",
        "cpu",
        "--steps",
        "24",
        "--batch",
        "2",
        "--lr",
        "2e-2",
    ]
    losses = train_dit.run(argv)
    assert len(losses) == 24
    assert np.isfinite(losses).all()
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:4])
    own = tmp_path / family
    train_vae.save(train_vae.build(family), family, tmp_path)
    pipeline = {"pipeline": PIPELINES[family], "prompt": "a red star", "model": str(own)}
    family = make_config({**pipeline, "height": 64, "width": 64, "frames": FRAMES}).pipeline.build().family
    family.open(Planned(planning=False))
    assert family.dit.checkpoint.nbytes > 0
    assert family.vae.checkpoint.nbytes > 0
    assert set(family.identity()) >= {"dit", "vae", "clip"}


@pytest.mark.parametrize("family", ["hunyuan", "pyramid"])
def test_a_video_autoencoder_learns_and_its_latents_get_the_familys_units(family, tmp_path, monkeypatch):
    video = data.render(data.scenes()[5], np.random.default_rng(0))[:9, 24:40, 24:40]
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
    vae = train_vae.build(family)
    mover = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(8):
        loss = train_vae.loss_of(vae, x, "cpu")
        mover.zero_grad()
        loss.backward()
        mover.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    several = torch.cat((x, x.flip(-1), -x))
    monkeypatch.setattr(train_vae, "clips", lambda rng, batch: several)
    with torch.no_grad():
        before = train_vae.decode(vae, train_vae.moments(vae, several)[0])
        train_vae.in_units(vae.eval(), family, "cpu")
        mean, _ = train_vae.moments(vae, several)
        after = train_vae.decode(vae, mean)
    shift, deviation = (0.0, 1.0) if family == "hunyuan" else (-0.2343, 3.0986)
    torch.testing.assert_close(mean.mean((0, 2, 3, 4)), torch.full((8,), shift), atol=2e-3, rtol=0)
    torch.testing.assert_close(mean.std((0, 2, 3, 4)), torch.full((8,), deviation), atol=2e-2, rtol=0)
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    train_vae.save(vae, family, tmp_path)
    folder = tmp_path / family / train_vae.FOLDERS[family]
    assert json.loads((folder / "config.json").read_text()) == train_vae.CONFIGS[family]
    assert load_file(folder / "diffusion_pytorch_model.safetensors").keys() == vae.state_dict().keys()
