"""Streamed latents are those of the plain modules, whatever the memory and the policy."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from blockstream.plugins import hookimpl
from blockstream.plugins.euler import sample
from blockstream.run import runner
from movd.captions import official_prompt
from movd.rflow import OpenSoraFlow
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import embed, t5_encoder
from movd.tokenizer import load_tokenizer
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from movd.video import to_frames
from tests.support.costs import fix_costs

STEPS, FRAMES, HEIGHT, WIDTH, SEED, GUIDANCE = 3, 22, 24, 40, 7, 4.0
PROMPTS = ["a red star moving left", ""]
NUMERICS = {
    "prompts": PROMPTS,
    "height": HEIGHT,
    "width": WIDTH,
    "frames": FRAMES,
    "steps": STEPS,
    "seed": SEED,
    "guidance": GUIDANCE,
    "cache": "off",
}


def resident(models, part):
    folder = Path(models[part]["path"])
    config = json.loads((folder / "config.json").read_text())
    if part == "t5":
        model = t5_encoder(config)
        state = {}
        for shard in sorted(folder.glob("*.bin")):
            state.update(torch.load(shard, weights_only=True))
    else:
        kinds = {"dit": (STDiT3, STDiT3Config), "vae": (OpenSoraVAE, OpenSoraVAEConfig)}
        make, options = kinds[part]
        model = make(options(**config))
        state = load((folder / "model.safetensors").read_bytes())
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(name="plain", scope="module")
def _plain(models):
    """The latents and frames of each prompt, computed without the engine, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    t5, dit, vae = (resident(models, part) for part in ("t5", "dit", "vae"))
    tokenizer = load_tokenizer(Path(models["t5"]["path"]), dit.config.model_max_length)
    shape = (1, 4, vae.config.latent_frames(FRAMES), HEIGHT // 8, WIDTH // 8)
    made = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            y, mask = embed(t5, tokenizer, [official_prompt(prompt)])
            flow = OpenSoraFlow(dit, y, mask, STEPS, GUIDANCE, HEIGHT, WIDTH, FRAMES, 24)
            z = sample(flow, torch.randn(shape, generator=torch.Generator().manual_seed(SEED)))
            made.append((z, to_frames(vae.decode(z, FRAMES)[0])))
    torch.set_num_threads(threads)
    return made


def latents(out):
    return [load((out / f"{n:04d}" / "latents.safetensors").read_bytes())["z"] for n in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("arena", "policy", "budget"),
    [
        ("608KiB", "none", "auto"),
        ("660KiB", "prefix", "auto"),
        ("700KiB", "spread", "auto"),
        ("760KiB", "auto", "8GiB"),
        ("16MiB", "auto", "50%"),
        ("auto", "none", "auto"),
    ],
)
def test_streamed_latents_are_those_of_the_plain_modules(config, plain, tmp_path, arena, policy, budget):
    runner.run(config(**NUMERICS, arena=arena, policy=policy, budget=budget), tmp_path / "out")
    for streamed, (z, _) in zip(latents(tmp_path / "out"), plain, strict=True):
        assert torch.equal(streamed, z)
    assert not torch.equal(plain[0][0], plain[1][0])


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    """The folder of a run of both prompts."""
    out = tmp_path_factory.mktemp("both") / "out"
    runner.run(config(**NUMERICS), out)
    return out


def test_the_video_is_the_plain_modules_frames_encoded(both, plain, tmp_path):
    from movd.video import write_video

    for n, (_, frames) in enumerate(plain):
        write_video(tmp_path / "plain.mp4", [frames], 24)
        made = (both / f"{n:04d}" / "video.mp4").read_bytes()
        assert made == (tmp_path / "plain.mp4").read_bytes()


class Tail:
    """Holds compute before T5's last visit until the head of STDiT3 has been read."""

    def __init__(self):
        self.loaded = threading.Event()
        self.waited = False

    @hookimpl
    def segment_loaded(self, span):
        if span.visit.stage == 1:
            self.loaded.set()

    @hookimpl
    def segment_executed(self, span):
        if span.visit[:2] == (0, len(PROMPTS) - 1) and span.label.endswith(".2"):
            self.waited = self.loaded.wait(60)


def test_the_head_of_stdit3_is_read_while_t5_computes_and_changes_no_bit(
    config, plain, tmp_path, monkeypatch
):
    fix_costs(monkeypatch)  # where slots lie, and so what the head waits for, follows from costs
    tail = Tail()
    runner.run(config(**NUMERICS, arena="2MiB", policy="none"), tmp_path / "out", observers=[tail])
    assert tail.waited
    assert all(torch.equal(a, b) for a, (b, _) in zip(latents(tmp_path / "out"), plain, strict=True))


def test_a_prompt_makes_the_same_video_alone_as_among_others(both, config, tmp_path):
    alone = {**NUMERICS, "prompts": None, "prompt": PROMPTS[1]}
    runner.run(config(**alone), tmp_path / "alone")
    alone = (tmp_path / "alone" / "video.mp4").read_bytes()
    assert alone == (both / "0001" / "video.mp4").read_bytes()


@pytest.mark.parametrize("key", ["seed", "guidance", "steps"])
def test_other_numerics_give_another_video(config, plain, tmp_path, key):
    runner.run(config(**{**NUMERICS, key: NUMERICS[key] + 1}), tmp_path / "out")
    assert not torch.equal(latents(tmp_path / "out")[0], plain[0][0])


def test_the_written_config_runs_the_same_again(config, tmp_path, monkeypatch):
    from blockstream.run.config import load_config

    (tmp_path / "prompts.txt").write_text("\n".join(["a red star", "a blue circle"]))
    first = {**NUMERICS, "prompts": str(tmp_path / "prompts.txt"), "threads": "auto"}
    runner.run(config(**first, sampler={"name": "lpl", "leap": 3}), tmp_path / "out")
    (tmp_path / "prompts.txt").unlink()
    monkeypatch.chdir(tmp_path)
    again = load_config(tmp_path / "out" / "config.yaml")
    runner.run(again, tmp_path / "again")
    written = [(tmp_path / name / "config.yaml").read_text() for name in ("out", "again")]
    assert written[0] == written[1]
    for before, after in zip(latents(tmp_path / "out"), latents(tmp_path / "again"), strict=True):
        assert torch.equal(before, after)
