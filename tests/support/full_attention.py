"""A pipeline as a stranger would write one: full attention over a video, text behind, by the seam."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import save, save_file
from torch import nn

from blockstream.module.attention import UNCHANGED, attention_hooks, numbered
from blockstream.plan.segments import AtMost
from blockstream.plugins import AttentionLayer, Choice, current_run, hookimpl
from blockstream.streaming.pace import pace

GRID, WIDTH, HEADS, TEXT, REAL = (4, 4, 6), 16, 2, 5, 3
LATENTS = "latents.safetensors"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.seam = UNCHANGED

    def forward(self, video, text):
        """Return video [B, T, S, C] and text [B, L, C] after attention to each other."""
        kept = [text]

        def attend(x, kernel):
            B, T, S, _ = x.shape
            tokens = torch.cat((x.flatten(1, 2), text), 1)
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1)
            )
            if kernel is None:
                keep = torch.arange(T * S + TEXT)[None] < T * S + REAL
                y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
            else:
                y = kernel(q, k, v, [REAL] * B)
            y = y.transpose(1, 2).flatten(2)
            kept[0] = y[:, T * S :]
            return y[:, : T * S].unflatten(1, (T, S))

        return self.seam.around(video, attend), kept[0]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x, text):
        for block in self.blocks:
            y, words = block(x, text)
            x, text = x + y, text + words
        return x


def layers(model):
    found = [
        AttentionLayer(f"blocks.{i}", "full", GRID, WIDTH, HEADS, trailing=TEXT)
        for i in range(len(model.blocks))
    ]
    return list(zip(model.blocks, numbered(found), strict=True))


class Flow:
    straight = True

    def __init__(self, model, text, steps):
        self.model, self.text = model, text
        self.times = [1 - i / steps for i in range(steps)]

    def velocity(self, z, i):
        run = current_run()
        run.step, run.steps = i, len(self.times)
        return self.model(z, self.text)

    def advance(self, z, v, i, to):
        times = (*self.times, 0.0)
        return z + v * (times[i] - times[to])

    def remaining(self, n): ...

    def step_done(self, i, z, memory): ...

    def state(self):
        return {}


class Options(BaseModel):
    folder: Path
    prompts: list[str] = ["a", "b"]
    steps: int = 4
    seed: int = 0


class Pipeline:
    def __init__(self, options):
        self.options = options

    def declare(self, session, run):
        o = self.options
        with torch.device("meta"):
            model = Denoiser()
        inputs = {
            "x": torch.empty(1, GRID[0], GRID[1] * GRID[2], WIDTH),
            "text": torch.empty(1, TEXT, WIDTH),
        }
        shares = pace(model, inputs, run, o.steps, layers)
        self.paced = shares * len(o.prompts)
        most = run.passes(o.steps)[1] * len(o.prompts)
        self.model = session.stage(
            "dit", model, o.folder, passes=AtMost(most), example_inputs=inputs, pace=self.paced
        )
        run.files.declare([LATENTS])

    @torch.inference_mode()
    def run(self, session, run):
        found = {}
        with attention_hooks(
            layers(self.model), token_merge=run.token_merge, attention_kernel=run.attention_kernel
        ):
            for n, _ in enumerate(self.options.prompts):
                random = torch.Generator().manual_seed(self.options.seed + n)
                z, text = (
                    torch.randn(1, *shape, WIDTH, generator=random)
                    for shape in ((GRID[0], GRID[1] * GRID[2]), (TEXT,))
                )
                found[f"{n}"] = run.sampler(Flow(self.model, text, self.options.steps), z)
        run.files.write(LATENTS, save(found))
        return {"prompts": self.options.prompts, "pace": list(self.paced)}


def save_weights(folder):
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tensors = {k: torch.randn_like(v) * 0.4 for k, v in Denoiser().state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@hookimpl
def pipelines():
    return [Choice("full-attention", Pipeline, Options)]
