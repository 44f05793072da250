"""What HunyuanVideo and Pyramidal Flow computed when they agreed with the originals.

`python -m tests.support.families_frozen` writes it anew. The golden data is not part of the repository; these
few numbers guard the families without it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from blockstream.plugins.euler import sample
from movd.clip import pooled
from movd.hunyuan.autoencoder import tiling
from movd.hunyuan.guided import HunyuanFlow
from movd.hunyuan.llama import embed_prompt
from movd.pyramid.legs import Guidance, Journey, StageFlow, normalised, unnormalised
from movd.pyramid.stages import make_stages
from tests.support import families_tiny as tiny
from tests.support.movd_tiny import noise

PATH = Path(__file__).parents[1] / "data" / "families_frozen.safetensors"


def journey(image=None):
    """Return the latents of three frames, noise of a formula at each jump."""
    words = tiny.words(1).joined(tiny.words(0, 4))
    guidance = Guidance(4.0, 3.0)
    made = Journey(
        noise(1, 4, 3, 8, 16, key=21),
        make_stages(),
        steps_first=(2, 1, 2),
        steps_others=(1, 2, 1),
        image=image,
        fresh=lambda unit, stage, shape: noise(*shape, key=30 + 3 * unit + stage),
    )
    model, z = tiny.miniflux(), None
    for leg in made.legs:
        stage = made.stages[leg.stage]
        flow = StageFlow(model, words, made.past(leg), stage, made.steps(leg), guidance.scale(leg.unit))
        z = sample(flow, made.begin(leg, z))
        made.end(leg, z)
    return made.done


@torch.inference_mode()
def compute():
    """Return the tensors, by name."""
    ids = torch.tensor([[5, 9, 3, 12, 60, 7, 1, 1]])
    states, _ = embed_prompt(tiny.llama(), ids, ids.ne(1).long(), 2)
    inputs = tiny.hunyuan_inputs()
    flow = HunyuanFlow(
        tiny.hunyuan(), tiny.prompt(), 3, negative=tiny.prompt(3, 2), true_guidance=2.0, shift=5.0
    )
    rounded = HunyuanFlow(tiny.hunyuan().bfloat16(), tiny.prompt(), 2, rounded=True)
    z = noise(1, 4, 6, 3, 5, key=5)
    vae, tiles = tiny.hunyuan_vae(), tiling("diffusers", 256, 4, 8)
    first = normalised(tiny.pyramid_encoder()(noise(1, 3, 1, 64, 128, key=7))[:, :4])
    latents = journey(first)
    frames = torch.cat(list(tiny.pyramid_decoder().decode_chunks(unnormalised(latents[..., :5]), 1)), 2)
    return {
        "llama.states": states,
        "clip.pooled": pooled(tiny.clip(), ids),
        "hunyuan.out": tiny.hunyuan()(**inputs, return_dict=False)[0],
        "hunyuan.sampled": sample(flow, inputs["hidden_states"]),
        "hunyuan.rounded": sample(rounded, inputs["hidden_states"]).float(),
        "hunyuan_vae.decoded": torch.cat(list(vae.decode_clips(z, tiles)), 2)[:, :, ::3, ::4, ::4],
        "pyramid.latents": journey(),
        "pyramid.from_image": latents,
        "pyramid_vae.decoded": frames[:, :, ::5, ::4, ::4],
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in compute().items()}, PATH)
    print(PATH, PATH.stat().st_size, "bytes")
