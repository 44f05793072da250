"""Train a tiny denoiser of HunyuanVideo or Pyramidal Flow, and its text encoders, on train_tiny's captions.

    python -m examples.train_families.train_dit hunyuan --work build/train_families

Takes FAMILY's VAE; writes `FAMILY/latents.safetensors` once, `FAMILY/dit.pt`, from which it goes on, and
the folders that `pipeline: hunyuan-video` or `pyramid-flow` reads as `model`.

HunyuanVideo embeds its guidance: from the middle of the training on the target is the velocity plus (g -
1) times what the average of the weights adds for the caption, at a g drawn for each batch. Pyramidal Flow
learns a unit and a stage a batch: from the stage's start, the doubled smaller frame with noise, to its
end, beside the clean frames before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.train_families import tiny_text, train_vae
from examples.train_families.training import FRAMES, arguments, autocast, train
from examples.train_tiny import data, text
from movd.hunyuan.denoiser import hunyuan_denoiser
from movd.hunyuan.guided import shifted_times
from movd.pyramid.legs import FIRST, OTHERS
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig
from movd.pyramid.stages import doubled, halved, history, make_stages

SHARED = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "hunyuan": {
        "_class_name": "HunyuanVideoTransformer3DModel",
        **SHARED,
        "in_channels": train_vae.CHANNELS,
        "out_channels": train_vae.CHANNELS,
        "num_refiner_layers": 1,
        "text_embed_dim": tiny_text.WIDTH,
        "pooled_projection_dim": tiny_text.CLIP["hidden_size"],
        "rope_axes_dim": [8, 12, 12],
    },
    "pyramid": {
        "_class_name": "PyramidFluxTransformer",
        **SHARED,
        "in_channels": 4 * train_vae.CHANNELS,
        "joint_attention_dim": text.CONFIG["d_model"],
        "pooled_projection_dim": tiny_text.CLIP["hidden_size"],
        "axes_dims_rope": [8, 12, 12],
    },
}
FOLDERS = {"hunyuan": ("transformer",), "pyramid": ("diffusion_transformer_384p",)}
SHIFT, MOST_GUIDANCE, DROPPED = 7.0, 6.0, 0.1
STAGES = 3


class Trained(nn.Module):
    """A denoiser and its text encoders."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.main, self.clip = tiny_text.build(family)
        config = CONFIGS[family]
        self.dit = hunyuan_denoiser(config) if family == "hunyuan" else MiniFlux(MiniFluxConfig(**config))

    def words(self, ids: Tensor, mask: Tensor, clip: Tensor, crop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return states [B, L, C], mask [B, L] and vector [B, P] of tokenised captions."""
        states = self.main(input_ids=ids, attention_mask=mask).last_hidden_state[:, crop:]
        return states, mask[:, crop:], self.clip(input_ids=clip).pooler_output

    def forward(self, z: Any, t: Tensor, words: tuple[Tensor, Tensor, Tensor], guidance: Tensor) -> Tensor:
        """Return the velocity, noise - data; t [B] in 0..1000."""
        states, mask, vector = words
        if self.family == "pyramid":
            return self.dit(z, t, states, mask, vector).float()
        out = self.dit(z, t, states, mask, vector, guidance=1000 * guidance, return_dict=False)[0]
        return out.float()


@torch.no_grad()
def latents(family: str, work: Path, device: str, videos: int, seed: int) -> dict[str, Tensor]:
    """Return latents [n, c, T, 8, 8] of fresh videos, as the denoiser has them, and their scenes' numbers."""
    cache = work / family / "latents.safetensors"
    if cache.exists():
        return load_file(cache)
    vae = train_vae.build(family).to(device).eval()
    vae.load_state_dict(
        load_file(work / family / train_vae.FOLDERS[family] / "diffusion_pytorch_model.safetensors")
    )
    rng, scenes = np.random.default_rng(seed), data.scenes()
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-videos // len(scenes)))])[:videos]
    found = []
    for at in order:
        frames = torch.from_numpy(data.render(scenes[at], rng)[:FRAMES])
        x = frames.permute(3, 0, 1, 2)[None].float().div(127.5).sub(1).to(device)
        if family == "hunyuan":
            found.append(vae.encode(x).latent_dist.mode().half().cpu())
        else:
            z, _ = train_vae.moments(vae, x)
            z[:, :, :1] = (z[:, :, :1] - FIRST[0]) * FIRST[1]
            z[:, :, 1:] = (z[:, :, 1:] - OTHERS[0]) * OTHERS[1]
            found.append(z.half().cpu())
    made = {"latents": torch.cat(found), "scenes": torch.from_numpy(order)}
    save_file(made, cache)
    return made


def hunyuan_loss(model: Trained, average: Trained, x: Tensor, words: Any, empty: Any, done: float) -> Tensor:
    """Return the squared velocity error at shifted times."""
    u = torch.rand(len(x), device=x.device)
    t = SHIFT * u / (1 + (SHIFT - 1) * u)
    at, noise = t.view(-1, 1, 1, 1, 1), torch.randn_like(x)
    z, target = (1 - at) * x + at * noise, noise - x
    guidance = torch.ones_like(t)
    if done > 0.5:
        scale = 1 + (MOST_GUIDANCE - 1) * float(torch.rand(()))
        with torch.no_grad():
            inputs = (average.words(*words), average.words(*empty))
            seen, blind = (average(z, 1000 * t, own, guidance) for own in inputs)
            target = target + (scale - 1) * (seen - blind)
        guidance = guidance * scale
    return (model(z, 1000 * t, model.words(*words), guidance) - target).square().mean()


def pyramid_loss(model: Trained, x: Tensor, words: Any, rng: np.random.Generator) -> Tensor:
    """Return the squared velocity error of one unit at one stage."""
    stages = make_stages(STAGES)
    unit, at = int(rng.integers(x.shape[2])), int(rng.integers(STAGES))
    stage, clean = stages[at], x[:, :, unit : unit + 1]
    sizes = [clean]
    for _ in range(STAGES - 1):
        sizes.insert(0, halved(sizes[0]))
    noise = torch.randn_like(sizes[at])
    before = doubled(sizes[at - 1]) if at else torch.zeros_like(noise)
    start = stage.start * noise + (1 - stage.start) * before
    end = stage.end * noise + (1 - stage.end) * sizes[at]
    local = torch.rand(len(x), device=x.device)
    where = local.view(-1, 1, 1, 1, 1)
    z = where * start + (1 - where) * end
    t = stage.last + local * (stage.first - stage.last)
    past = history(x[:, :, :unit], at, STAGES)
    return (model([*past, z], t, model.words(*words), local) - (start - end)).square().mean()


def save(model: Trained, work: Path) -> None:
    """Write the folders of the denoiser, the text encoders and the scheduler."""
    family, folder = model.family, work / model.family
    tiny_text.save(family, folder, model.main, model.clip)
    for name in FOLDERS[family]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(CONFIGS[family], indent=2) + "\n")
        tensors = {key: value.cpu().contiguous() for key, value in model.dit.state_dict().items()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    if family == "hunyuan":
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": SHIFT}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler) + "\n")


def run(argv: list[str] | None = None) -> list[float]:
    """Parse a command line and train; return each step's loss."""
    parser = arguments(__doc__, steps=12000, batch=48, lr=2e-3)
    parser.add_argument("--videos", type=int, default=4608, help="four of each scene")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rng, scenes, held = np.random.default_rng(args.seed), data.scenes(), data.held_out()
    known = latents(args.family, args.work, args.device, args.videos, args.seed + 100)
    chosen = [i for i, n in enumerate(known["scenes"].tolist()) if scenes[n].combination not in held]
    first, second = tiny_text.write_tokenizers(args.family, args.work / args.family)
    model = Trained(args.family).to(args.device).train()
    assert float(shifted_times(2, SHIFT)[1]) == SHIFT / (1 + SHIFT)

    def tokens(captions: list[str]) -> Any:
        ids, mask = first.encode(captions)
        clip = second.encode(captions)
        return *(x.to(args.device) for x in (ids, mask, clip)), getattr(first, "crop", 0)

    def loss(model: nn.Module, average: nn.Module, done: float) -> Tensor:
        rows = rng.choice(chosen, size=args.batch)
        captions = [text.training_caption(scenes[int(known["scenes"][i])], rng) for i in rows]
        captions = ["" if rng.random() < DROPPED else caption for caption in captions]
        x = known["latents"][rows].float().to(args.device)
        with autocast(args.device):
            if args.family == "pyramid":
                return pyramid_loss(model, x, tokens(captions), rng)
            return hunyuan_loss(model, average, x, tokens(captions), tokens([""] * len(rows)), done)

    return train(
        model, args, loss, args.work / args.family / "dit.pt", lambda average: save(average, args.work)
    )


if __name__ == "__main__":
    run()
