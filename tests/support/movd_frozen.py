"""What the models gave when they agreed with the originals (`python -m tests.support.movd_frozen` writes it).

The golden data is not part of the repository; these few numbers guard the models without it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from blockstream.plugins.euler import sample
from movd.rflow import OpenSoraFlow, timesteps
from tests.support import movd_tiny as tiny

PATH = Path(__file__).parents[1] / "data" / "movd_frozen.safetensors"


@torch.inference_mode()
def compute():
    """Return the tensors, by name."""
    dit, vae, t5 = tiny.stdit3(), tiny.vae(), tiny.t5()
    inputs = tiny.dit_inputs()
    known = torch.tensor([[False, True, True], [True, True, False]])
    clip = tiny.noise(1, 3, 20, 16, 24, key=4)
    latents = tiny.noise(1, 4, 6, 2, 3, key=5)
    ids = torch.tensor([[5, 9, 3, 1, 0, 0], [7, 2, 19, 4, 8, 1]])
    flow = OpenSoraFlow(
        dit,
        inputs["y"],
        inputs["mask"],
        steps=3,
        guidance=4.0,
        height=40,
        width=32,
        frames=51,
        fps=24,
        x_mask=torch.tensor([[0.0, 1.0, 1.0]]),
    )
    return {
        "stdit3.out": dit(**inputs),
        "stdit3.known_frames": dit(**inputs, x_mask=known),
        "vae.encoded": vae.encode(clip, sample=False),
        "vae.decoded": vae.decode(latents, 20)[:, :, ::3, ::4, ::4],
        "t5.embedded": t5(input_ids=ids, attention_mask=ids.ne(0).long()).last_hidden_state,
        "rflow.times": timesteps(30, 240, 426, 51),
        "rflow.times_bf16": timesteps(30, 240, 426, 51, size_dtype=torch.bfloat16),
        "rflow.sampled": sample(flow, inputs["x"]),
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in compute().items()}, PATH)
    print(PATH, PATH.stat().st_size, "bytes")
