"""Train the temporal half of the tiny VAE on the latents of the 2-D half, and save the whole VAE.

    python -m examples.train_tiny.train_temporal --work build/train_tiny

Takes `vae2d.pt`, writes `frames.safetensors` (latents of single frames, drawn once), then `vae/`:
config.json and model.safetensors with the official keys. The loss is the squared error of the frames'
latents + 1e-4 KL; pixels need no part in it. Run it again to go on from `temporal.pt`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from examples.train_tiny import checker, data
from examples.train_tiny.train_vae import CONFIG, psnr, to_tensor
from movd.vae import LATENT_SCALE, OpenSoraVAE, OpenSoraVAEConfig

CHUNK = 17
TEMPORAL = {
    "filters": 32,
    "num_res_blocks": 1,
    "channel_multipliers": (1, 2, 2),
    "temporal_downsample": (True, True),
    "num_groups": 8,
}


def build(shift: tuple[float, ...] = (0.0,) * 4, scale: tuple[float, ...] = (1.0,) * 4) -> OpenSoraVAE:
    """Return the tiny VAE, untrained."""
    config = OpenSoraVAEConfig(
        spatial=CONFIG,
        temporal=TEMPORAL,
        micro_batch_size=CHUNK,
        micro_pixels=CHUNK * data.SIZE**2,
        shift=shift,
        scale=scale,
    )
    return OpenSoraVAE(config)


@torch.no_grad()
def whiten(vae: OpenSoraVAE) -> None:
    """Fold a change of units into the 2-D VAE: its latents times 0.18215 get mean 0 and deviation 1."""
    net = vae.spatial_vae.module
    frames, _ = next(data.single_frames(seed=7, batch=256))
    means = vae.spatial_vae.moments(to_tensor(frames))[0]
    mean, gain = means.mean((0, 2, 3)), 1 / (means.std((0, 2, 3)) * LATENT_SCALE)
    inward, outward = net.quant_conv, net.post_quant_conv
    outward.bias += outward.weight[..., 0, 0] @ mean
    outward.weight /= gain[None, :, None, None]
    inward.weight[:4] *= gain[:, None, None, None]
    inward.bias[:4] = (inward.bias[:4] - mean) * gain
    inward.bias[4:] += 2 * gain.log()


@torch.no_grad()
def frame_latents(vae: OpenSoraVAE, videos: int, seed: int) -> dict[str, torch.Tensor]:
    """Return the latents between the two VAEs of fresh videos, float16 [videos, 4, FRAMES, 8, 8].

    The scene of each comes along as an index into `data.scenes()`; every scene is drawn equally often.
    """
    rng = np.random.default_rng(seed)
    everything = data.scenes()
    order = np.concatenate([rng.permutation(len(everything)) for _ in range(-(-videos // len(everything)))])[
        :videos
    ]
    latents = torch.empty(videos, 4, data.FRAMES, data.SIZE // 8, data.SIZE // 8, dtype=torch.float16)
    for i, at in enumerate(order):
        frames = to_tensor(data.render(everything[at], rng))
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = vae.spatial_vae.moments(frames)
        latents[i] = (mean.float() * LATENT_SCALE).transpose(0, 1)
    return {"latents": latents, "scenes": torch.from_numpy(order)}


def loss_of(vae: OpenSoraVAE, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its squared-error part for frames' latents [B, 4, 17, h, w]."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.temporal_vae.moments(chunk)
        drawn = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        out = vae.temporal_vae.decode(drawn, CHUNK)
    mean, logvar = mean.float(), logvar.float()
    error = (out.float() - chunk).square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error + 1e-4 * kl, error.detach()


@torch.no_grad()
def encode_means(vae: OpenSoraVAE, latents: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Return the temporal means, not normalised, float16 [videos, 4, T', h, w]."""
    parts = []
    for part in latents.split(batch):
        chunks = part.float().split(CHUNK, dim=2)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(torch.cat([vae.temporal_vae.moments(c)[0] for c in chunks], dim=2).half())
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(vae: OpenSoraVAE, videos: int, seed: int = 4242) -> dict[str, float]:
    """Return the PSNR in dB and the share of videos read fully right after encoding and decoding."""
    rng = np.random.default_rng(seed)
    everything = data.scenes()
    ratios, right = [], []
    for _ in range(videos):
        scene = everything[rng.integers(len(everything))]
        x = to_tensor(data.render(scene, rng)).transpose(0, 1)[None]
        y = vae.decode(vae.encode(x, sample=False), data.FRAMES)
        ratios.append(psnr(y[0].transpose(0, 1), x[0].transpose(0, 1)))
        right.append(all(checker.read(to_frames(y[0])).judge(scene).values()))
    return {"psnr_db": float(np.mean(ratios)), "right": float(np.mean(right)), "videos": videos}


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Turn float [3, T, h, w] in -1..1 into uint8 [T, h, w, 3]."""
    return video.add(1).mul(127.5).clamp(0, 255).round().byte().permute(1, 2, 3, 0).numpy()


def save(vae: OpenSoraVAE, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = vae.config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> OpenSoraVAE:
    """Return the VAE saved in a folder."""
    vae = OpenSoraVAE(OpenSoraVAEConfig(**json.loads((folder / "config.json").read_text())))
    vae.load_state_dict(load_file(folder / "model.safetensors"))
    return vae.eval()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--videos", type=int, default=3456, help="three of each scene")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    vae = build()
    vae.spatial_vae.module.load_state_dict(torch.load(args.work / "vae2d.pt", weights_only=True)["average"])
    whiten(vae)
    cache = args.work / "frames.safetensors"
    if not cache.exists():
        began = time.monotonic()
        save_file(frame_latents(vae, args.videos, args.seed + 100), cache)
        print(f"{args.videos} videos to latents: {time.monotonic() - began:.0f} s", flush=True)
    latents = load_file(cache)["latents"]

    checkpoint = args.work / "temporal.pt"
    net = vae.temporal_vae
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    generator = torch.Generator().manual_seed(args.seed + 1 + step)
    began = time.monotonic() - spent
    errors = []
    while step < args.steps:
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        rows = torch.randint(len(latents), (args.batch,), generator=generator)
        start = int(torch.randint(data.FRAMES - CHUNK + 1, (), generator=generator))
        loss, error = loss_of(vae, latents[rows, :, start : start + CHUNK].float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
        step += 1
        if step % 100 == 0 or step == args.steps:
            seconds = time.monotonic() - began
            print(f"{step} {seconds / 60:.2f} min mse {np.mean(errors[-50:]):.5f}", flush=True)
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "seconds": seconds}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    means = encode_means(vae, latents[: 4 * 288]).float()
    shift, scale = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    final = build(tuple(round(v, 4) for v in shift.tolist()), tuple(round(v, 4) for v in scale.tolist()))
    normalisation = {"shift": final.shift, "scale": final.scale}
    final.load_state_dict({**vae.state_dict(), **normalisation})
    save(final, args.work / "vae")
    print(json.dumps(reconstruct(final.eval(), 48)), flush=True)


if __name__ == "__main__":
    main()
