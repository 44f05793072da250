"""Train a tiny video VAE of HunyuanVideo's or Pyramidal Flow's class on drawn clips, in pixels.

    python -m examples.train_families.train_vae hunyuan --work build/train_families

Writes `FAMILY/vae.pt`, from which it goes on, and FAMILY's folder of the VAE. Clips are 17 frames long:
one tile of HunyuanVideo's decoder, three latents of Pyramidal Flow's. Loss: squared error + 0.1 absolute
error, five times as heavy where a shape is, + 1e-4 KL. At the end a change of units is folded in, so that
latents are what the family's constants expect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.train_families.training import arguments, autocast, train
from examples.train_tiny import data
from movd.hunyuan.autoencoder import hunyuan_vae
from movd.pyramid.causal_vae import CausalVAEConfig, CausalVideoVAE
from movd.pyramid.legs import OTHERS

CLIP = 17
WIDTHS = (16, 32, 64, 64)
CHANNELS = 8
CONFIGS: dict[str, dict[str, Any]] = {
    "hunyuan": {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "latent_channels": CHANNELS,
        "block_out_channels": list(WIDTHS),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
    },
    "pyramid": {
        "_class_name": "CausalVideoVAE",
        "encoder_out_channels": CHANNELS,
        "encoder_layers_per_block": [1, 1, 1, 1],
        "encoder_block_out_channels": list(WIDTHS),
        "encoder_norm_num_groups": 8,
        "decoder_in_channels": CHANNELS,
        "decoder_layers_per_block": [1, 1, 1, 1],
        "decoder_block_out_channels": list(WIDTHS),
        "decoder_norm_num_groups": 8,
    },
}
FOLDERS = {"hunyuan": "vae", "pyramid": "causal_video_vae"}


def build(family: str) -> nn.Module:
    """Return the VAE, untrained."""
    if family == "hunyuan":
        return hunyuan_vae(CONFIGS[family])
    return CausalVideoVAE(CausalVAEConfig(**CONFIGS[family]))


def moments(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of clips [B, 3, T, H, W], each whole."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: nn.Module, z: Tensor) -> Tensor:
    """Return clips of latents, each whole."""
    return vae.decoder(vae.post_quant_conv(z)).float()


def clips(rng: np.random.Generator, batch: int, frames: int = CLIP) -> Tensor:
    """Return clips [B, 3, frames, 64, 64] in -1..1 out of drawn videos, from anywhere in them."""
    scenes, found = data.scenes(), []
    for _ in range(batch):
        video = data.render(scenes[rng.integers(len(scenes))], rng)
        start = rng.integers(len(video) - frames + 1)
        found.append(torch.from_numpy(video[start : start + frames]))
    return torch.stack(found).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def loss_of(vae: nn.Module, x: Tensor, device: str) -> Tensor:
    """Return the training loss of clips x."""
    with autocast(device):
        mean, logvar = moments(vae, x)
        out = decode(vae, mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    border = x[..., :1, :1]
    shape = ((x - border).abs().amax(1, keepdim=True) > 0.2).float()
    error = out - x
    pixels = ((1 + 4 * shape) * (error.square() + 0.1 * error.abs())).mean()
    return pixels + 0.5e-4 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def _plain(conv: nn.Module) -> nn.Conv3d:
    return conv if isinstance(conv, nn.Conv3d) else conv.conv


@torch.no_grad()
def in_units(vae: nn.Module, family: str, device: str) -> None:
    """Fold a change of units into the VAE: every channel's mean and deviation are what the family expects."""
    x = clips(np.random.default_rng(7), 64)
    means = torch.cat([moments(vae, part.to(device))[0] for part in x.split(8)])
    shift, deviation = (0.0, 1.0) if family == "hunyuan" else (OTHERS[0], 1 / OTHERS[1])
    mean = means.mean((0, 2, 3, 4))
    gain = deviation / means.std((0, 2, 3, 4))
    inward, outward = _plain(vae.quant_conv), _plain(vae.post_quant_conv)
    outward.bias += outward.weight[..., 0, 0, 0] @ (mean - shift / gain)
    outward.weight /= gain[None, :, None, None, None]
    inward.weight[:CHANNELS] *= gain[:, None, None, None, None]
    inward.bias[:CHANNELS] = (inward.bias[:CHANNELS] - mean) * gain + shift
    inward.bias[CHANNELS:] += 2 * gain.log()


def save(vae: nn.Module, family: str, work: Path) -> None:
    """Write the VAE's folder."""
    folder = work / family / FOLDERS[family]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family], indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def main() -> None:
    """Parse the command line and train."""
    args = arguments(__doc__, steps=6000, batch=16, lr=1.5e-3).parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    (args.work / args.family).mkdir(parents=True, exist_ok=True)
    vae = build(args.family).to(args.device).train()

    def loss(model: nn.Module, average: nn.Module, done: float) -> Tensor:
        return loss_of(model, clips(rng, args.batch).to(args.device), args.device)

    def keep(average: nn.Module) -> None:
        x = clips(np.random.default_rng(4242), 8).to(args.device)
        with torch.no_grad():
            error = (decode(average, moments(average, x)[0]).clamp(-1, 1) - x).square().mean((1, 2, 3, 4))
        print(f"PSNR {(10 * torch.log10(4 / error)).mean():.1f} dB", flush=True)

    train(vae, args, loss, args.work / args.family / "vae.pt", keep)
    state = torch.load(args.work / args.family / "vae.pt", weights_only=True, map_location=args.device)
    vae.load_state_dict(state["average"])
    in_units(vae.eval(), args.family, args.device)
    save(vae, args.family, args.work)


if __name__ == "__main__":
    main()
