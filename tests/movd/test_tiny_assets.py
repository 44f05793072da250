"""The embedded model: official layouts, small, and it shows what its prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import movd
from examples.train_tiny import checker, evaluate, sample, train_temporal

FOLDER = Path(movd.__file__).parent / "assets" / "tiny"
PARTS = ("t5", "dit", "vae")

pytestmark = pytest.mark.skipif(not (FOLDER / "dit").is_dir(), reason="no embedded weights")


@pytest.fixture(name="tiny", scope="module")
def _tiny():
    return sample.load(FOLDER)


def test_each_part_has_a_config_and_safetensors():
    for part in PARTS:
        json.loads((FOLDER / part / "config.json").read_text())
        with safe_open(FOLDER / part / "model.safetensors", framework="pt") as file:
            assert len(list(file.keys())) > 10
    assert (FOLDER / "t5" / "tokenizer.json").is_file()


def test_the_embedded_model_is_at_most_30_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 30e6


def test_no_weight_is_nan_or_still_zero_everywhere(tiny):
    for model in (tiny.encoder, tiny.dit, tiny.vae):
        for name, weight in model.state_dict().items():
            assert torch.isfinite(weight).all(), name
    assert tiny.dit.final_layer.linear.weight.any()


def test_the_vae_reconstructs_at_30_decibels(tiny):
    assert train_temporal.reconstruct(tiny.vae, 3)["psnr_db"] >= 30


def test_most_of_eight_prompts_are_shown_right(tiny):
    chosen = [scene for _, scene in evaluate.prompts(8, seed=5)]
    latents = sample.sample(tiny, [scene.caption() for scene in chosen], list(range(8)), steps=30)
    clips = sample.decode(tiny, latents)
    right = [all(checker.read(clip).judge(scene).values()) for clip, scene in zip(clips, chosen, strict=True)]
    assert sum(right) >= 6


def test_a_start_seed_gives_the_same_latents_alone_and_again(tiny):
    captions = ["a red circle moving right slowly"]
    first = sample.sample(tiny, captions, [1], steps=2)
    assert torch.equal(first, sample.sample(tiny, captions, [1], steps=2))
    assert not torch.equal(first, sample.sample(tiny, captions, [2], steps=2))
