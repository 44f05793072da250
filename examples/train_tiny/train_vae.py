"""Train the 2-D half of the tiny VAE: diffusers' AutoencoderKL on single frames.

    python -m examples.train_tiny.train_vae --work build/train_tiny

Loss: squared error + 0.1 absolute error, five times as heavy on and near the shape, + 1e-4 KL.
AdamW, cosine decay, bfloat16 autocast, an exponential average of the weights. Run it again to go on
from the last checkpoint (`vae2d.pt`).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from examples.train_tiny import data

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": data.SIZE,
}


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """Turn uint8 [n, h, w, 3] into float [n, 3, h, w] in -1..1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio, dB, averaged over images [n, 3, h, w] in -1..1."""
    error = (a.clamp(-1, 1) - b).square().flatten(1).mean(1).clamp_min(1e-10)
    return (10 * torch.log10(4 / error)).mean().item()


def loss_of(model: AutoencoderKL, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the training loss of one batch: x [n, 3, h, w] in -1..1, near [n, h, w] bool."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(x).latent_dist
        out = model.decode(posterior.sample()).sample
    error = out.float() - x
    weight = (1 + 4 * near.float())[:, None]
    pixels = (weight * (error.square() + 0.1 * error.abs())).mean()
    return pixels + 1e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()


@torch.no_grad()
def validate(model: AutoencoderKL, batches: int = 4) -> float:
    """Return the PSNR in dB of the mean reconstruction of fresh frames."""
    stream = data.single_frames(seed=999, batch=32)
    scores = []
    for _ in range(batches):
        x = to_tensor(next(stream)[0])
        scores.append(psnr(model.decode(model.encode(x).latent_dist.mode()).sample, x))
    return float(np.mean(scores))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "vae2d.pt"

    torch.manual_seed(args.seed)
    model = AutoencoderKL.from_config(CONFIG)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    # A resumed run draws new frames: the stream is endless, so nothing needs to be replayed.
    stream = data.single_frames(args.seed + 1 + step, args.batch)
    began = time.monotonic() - spent
    while step < args.steps:
        rate = (
            args.lr
            * min(1, (step + 1) / 100)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        frames, near = next(stream)
        loss = loss_of(model, to_tensor(frames), torch.from_numpy(near))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 250 == 0 or step == args.steps:
            seconds = time.monotonic() - began
            print(
                f"{step} {seconds / 60:.2f} min loss {loss.item():.4f} psnr {validate(average):.2f} dB",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save({**state, "step": step, "seconds": seconds}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


if __name__ == "__main__":
    main()
