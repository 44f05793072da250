"""Small models of the official architectures with weights that are a formula, so that they never change."""

import math

import torch

from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import t5_encoder
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig

STDIT3 = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 8,
    "model_max_length": 6,
}
VAE = {
    "spatial": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "temporal": {"filters": 4, "num_res_blocks": 1, "num_groups": 2},
}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 3}


def noise(*shape, key=0):
    """Return numbers in -1..1 that depend on shape and key alone."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(i * 12.9898 + key * 78.233) * 43758.5453
    return ((wave - wave.floor()) * 2 - 1).float().reshape(shape)


def filled(model):
    """Return the model with every weight replaced: no zero initialisation hides an error."""
    with torch.no_grad():
        for key, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            if name in ("rope.freqs", "scale", "shift"):
                continue
            value = noise(*tensor.shape, key=key)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * value
            elif tensor.dim() >= 2 and "table" not in name:
                value = value * 1.4 / math.sqrt(tensor[0].numel())
            else:
                value = 0.3 * value
            tensor.copy_(value)
    return model.eval().requires_grad_(False)


def stdit3(**more):
    return filled(STDiT3(STDiT3Config(**{**STDIT3, **more})))


def vae(**more):
    return filled(OpenSoraVAE(OpenSoraVAEConfig(**{**VAE, **more})))


def t5():
    return filled(t5_encoder(T5))


def dit_inputs(batch=2, frames=3, height=5, width=4, lengths=(6, 3)):
    """Return keyword arguments of an STDiT3 forward: odd sizes, texts of different length."""
    mask = (torch.arange(STDIT3["model_max_length"]) < torch.tensor(lengths)[:, None]).long()
    return {
        "x": noise(batch, 4, frames, height, width, key=1),
        "timestep": 500 + 400 * noise(batch, key=2),
        "y": noise(batch, 1, STDIT3["model_max_length"], STDIT3["caption_channels"], key=3),
        "mask": mask,
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([40.0]),
        "width": torch.tensor([32.0]),
    }
