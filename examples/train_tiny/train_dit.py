"""Train the tiny STDiT3 and its T5 encoder together by rectified flow, and save all three models.

    python -m examples.train_tiny.train_dit --work build/train_tiny

Takes `frames.safetensors` and `vae/`; writes `t5/`, `dit/` beside them at every checkpoint, from an
exponential average of the weights, so that a half-trained model can be looked at.

Velocity = data - noise on the first four of the eight output channels. Times are drawn as 4u / (1 + 3u): half
above 0.8, where motion is decided. In a tenth of the batches the first latent frame is given, as it is to
a video that starts from an image. Muon moves the matrices inside blocks, AdamW the rest; the forward runs on
bfloat16 copies of float32 weights. Run it again to go on from the last checkpoint (`dit.pt`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from examples.train_tiny import checker, data, sample, text, train_temporal
from movd.stdit3 import STDiT3, STDiT3Block, STDiT3Config
from movd.t5 import t5_encoder

CONFIG = {
    "input_sq_size": data.SIZE,
    "in_channels": 4,
    "patch_size": (1, 2, 2),
    "hidden_size": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "pred_sigma": True,
    "caption_channels": text.CONFIG["d_model"],
    "model_max_length": text.MAX_TOKENS,
    "qk_norm": True,
}
GIVEN_FRAME = 0.1  # share of batches whose first latent frame is known


class TrainedSTDiT3(STDiT3):
    """STDiT3 whose blocks always see the same shapes, so that they can be compiled."""

    def text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return all text tokens and which are real, where STDiT3 would cut what no sample needs."""
        y = self.y_embedder(y).squeeze(1)
        return y, None if mask is None else mask.bool()

    def blocks(self, x: Tensor, m: Tensor, text: Tensor, keep: Tensor | None) -> Tensor:
        """Return x after all blocks; batches with a given frame are few and stay uncompiled."""
        with torch.compiler.set_stance("default" if m.shape[1] == 1 else "force_eager"):
            return super().blocks(x, m, text, keep)


class Pair(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = t5_encoder(text.CONFIG)
        self.dit = TrainedSTDiT3(STDiT3Config(**CONFIG))

    def forward(self, z: Tensor, t: Tensor, ids: Tensor, mask: Tensor, x_mask: Tensor | None) -> Tensor:
        """Return the velocity [B, 4, T, h, w] at times t in 0..1."""
        y = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, None]
        out = self.dit(z, 1000 * t, y, mask=mask, x_mask=x_mask, **sample.conditions())
        return out[:, :4]


def training_latents(work: Path) -> tuple[Tensor, list[data.Scene]]:
    """Return normalised latents [n, 4, T', h, w] and scenes of the videos that are not held out."""
    cache = load_file(work / "frames.safetensors")
    everything, held = data.scenes(), data.held_out()
    scenes = [everything[i] for i in cache["scenes"].tolist()]
    kept = [i for i, scene in enumerate(scenes) if scene.combination not in held]
    vae = train_temporal.load(work / "vae")
    means = train_temporal.encode_means(vae, cache["latents"][kept]).float()
    return (means - vae.shift) / vae.scale, [scenes[i] for i in kept]


def loss_of(pair: Pair, x: Tensor, ids: Tensor, mask: Tensor, given: bool) -> Tensor:
    """Return each sample's mean squared velocity error [B], and its time [B]."""
    u = torch.rand(len(x))
    t = 4 * u / (1 + 3 * u)
    noise = torch.randn_like(x)
    at = t[:, None, None, None, None]
    z, target = (1 - at) * x + at * noise, x - noise
    x_mask = None
    if given:
        x_mask = torch.ones(len(x), x.shape[2], dtype=torch.bool)
        x_mask[:, 0] = False
        z[:, :, 0] = x[:, :, 0]
    weights = {name: p.bfloat16() for name, p in pair.named_parameters()}
    out = functional_call(pair, weights, (z, t, ids, mask, x_mask))
    error = (out - target).square()
    return (error[:, :, 1:] if given else error).mean((1, 2, 3, 4)), t


def optimizers(pair: Pair, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of all blocks and AdamW for everything else."""
    inside = [
        p
        for name, p in pair.named_parameters()
        if p.ndim == 2 and "block" in name and not name.endswith(("table", "relative_attention_bias.weight"))
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in pair.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate(step: int, done: float) -> float:
    """Return the share of the learning rate: 100 steps up, level, down to 3% over the last 60%."""
    return min(1.0, (step + 1) / 100, max(0.03, (1 - done) / 0.6))


def export(pair: Pair, work: Path) -> None:
    """Write t5/ (with its tokenizer) and dit/ as config.json + model.safetensors."""
    text.write(work / "t5")
    (work / "dit").mkdir(exist_ok=True)
    encoder = pair.encoder.state_dict()
    encoder.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    config = pair.dit.config.model_dump(mode="json")
    (work / "dit/config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, tensors in (("t5", encoder), ("dit", pair.dit.state_dict())):
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})


def glance(work: Path, prompts: int = 32) -> dict[str, float]:
    """Return the shares of a few prompts shown fully right by the exported models, seen and held out."""
    tiny = sample.load(work)
    shares = {}
    for name, held in (("seen", False), ("held", True)):
        chosen = np.random.default_rng(77).choice(data.scenes(held), prompts // 2, replace=False)
        latents = sample.sample(tiny, [s.caption() for s in chosen], list(range(len(chosen))))
        verdicts = [
            checker.read(clip).judge(scene)
            for clip, scene in zip(sample.decode(tiny, latents), chosen, strict=True)
        ]
        shares[name] = float(np.mean([all(v.values()) for v in verdicts]))
        for attribute in verdicts[0]:
            shares[f"{name} {attribute}"] = float(np.mean([v[attribute] for v in verdicts]))
    return shares


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--growth",
        type=float,
        default=1.0,
        help="how many times as often as other motions growing and shrinking are drawn: they are learnt last",
    )
    parser.add_argument("--decay", type=float, default=0.999, help="of the average of the weights")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (half the time a step)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    latents, scenes = training_latents(args.work)
    chances = np.array([args.growth if s.motion in ("growing", "shrinking") else 1.0 for s in scenes])
    chances /= chances.sum()
    tokenizer = text.write(args.work / "t5")
    pair = Pair().train()
    average = copy.deepcopy(pair).requires_grad_(False)
    if args.compile:
        STDiT3Block.forward = torch.compile(STDiT3Block.forward, dynamic=False)
    movers = optimizers(pair, args.lr)
    checkpoint = args.work / "dit.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        pair.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for mover, saved in zip(movers, state["optimizers"], strict=True):
            mover.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
    torch.manual_seed(args.seed + 1 + step)
    rng = np.random.default_rng(args.seed + 1 + step)
    began = time.monotonic() - spent
    seen: list[tuple[float, float]] = []
    done = 0.0  # share of the training that is over, by steps or by time, whichever is more
    while done < 1:
        for mover in movers:
            for group in mover.param_groups:
                group["lr"] = args.lr * rate(step, done)
        rows = rng.choice(len(latents), size=args.batch, p=chances)
        captions = [text.training_caption(scenes[i], rng) for i in rows]
        ids, mask = tokenizer.encode(captions)
        errors, t = loss_of(pair, latents[rows], ids, mask, given=rng.random() < GIVEN_FRAME)
        for mover in movers:
            mover.zero_grad()
        errors.mean().backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        for mover in movers:
            mover.step()
        step += 1
        minutes = (time.monotonic() - began) / 60
        done = max(step / args.steps, minutes / args.minutes)
        decay = min(args.decay, step / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(pair.parameters()), 1 - decay)
        seen += zip(errors.tolist(), t.tolist(), strict=True)
        if step % 100 == 0:
            high = np.mean([e for e, t in seen if t > 0.8])
            low = np.mean([e for e, t in seen if t <= 0.8])
            print(f"{step} {minutes:.2f} min loss above 0.8 {high:.4f} below {low:.4f}", flush=True)
            seen = []
        if step % 250 == 0 or done >= 1:
            seconds = time.monotonic() - began
            state = {"model": pair.state_dict(), "average": average.state_dict()}
            state |= {"optimizers": [m.state_dict() for m in movers], "step": step, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            export(average, args.work)
        if step % 1000 == 0 or done >= 1:
            seconds = time.monotonic() - began
            with torch.compiler.set_stance("force_eager"):
                shares = glance(args.work)
            print(step, json.dumps({k: round(v, 2) for k, v in shares.items()}), flush=True)
            began = time.monotonic() - seconds  # looking is not training


if __name__ == "__main__":
    main()
