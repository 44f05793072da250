"""What both trainings share: the clock, the average of the weights, where a training goes on from."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

#: Frames of a clip: 4 k + 1 for HunyuanVideo, 8 k + 1 for Pyramidal Flow.
FRAMES = 49


def arguments(description: str | None, **defaults: float) -> argparse.ArgumentParser:
    """Return a parser of what every training takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("hunyuan", "pyramid"))
    parser.add_argument("--work", type=Path, default=Path("build/train_families"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=int(defaults["steps"]))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--batch", type=int, default=int(defaults["batch"]))
    parser.add_argument("--lr", type=float, default=defaults["lr"])
    parser.add_argument("--seed", type=int, default=0)
    return parser


def autocast(device: str) -> torch.autocast:
    """Return bfloat16 autocast for a device."""
    return torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of blocks and AdamW for everything else."""
    inside = [
        p for name, p in model.named_parameters() if p.ndim == 2 and ("block" in name or ".layers." in name)
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ]
    if inside:
        found.append(torch.optim.Muon(inside, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return found


def train(
    model: nn.Module,
    args: argparse.Namespace,
    loss_of: Callable[[nn.Module, nn.Module, float], Tensor],
    checkpoint: Path,
    keep: Callable[[nn.Module], None],
    every: int = 500,
) -> list[float]:
    """Train until the steps or the minutes are over, from the last checkpoint on; return each step's loss.

    `loss_of(model, average, done)` returns a loss; `keep(average)` writes what a run reads, at every
    checkpoint.
    """
    average = copy.deepcopy(model).requires_grad_(False).eval()
    movers = optimizers(model, args.lr)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for mover, saved in zip(movers, state["optimizers"], strict=True):
            mover.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
    torch.manual_seed(args.seed + 1 + step)
    began, losses = time.monotonic() - spent, list[float]()
    done = step / args.steps
    while done < 1:
        share = min(1.0, (step + 1) / 100, max(0.03, (1 - done) / 0.6))
        for mover in movers:
            for group in mover.param_groups:
                group["lr"] = args.lr * share
            mover.zero_grad()
        loss = loss_of(model, average, done)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for mover in movers:
            mover.step()
        step += 1
        losses.append(loss.item())
        minutes = (time.monotonic() - began) / 60
        done = max(step / args.steps, minutes / args.minutes)
        decay = min(0.999, step / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0 or done >= 1:
            last = losses[-50:]
            print(f"{step} {minutes:.2f} min loss {sum(last) / len(last):.4f}", flush=True)
        if step % every == 0 or done >= 1:
            seconds = time.monotonic() - began
            state = {"model": model.state_dict(), "average": average.state_dict()}
            state |= {"optimizers": [m.state_dict() for m in movers], "step": step, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            keep(average)
    return losses
