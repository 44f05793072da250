"""A pipeline of two small stages that have what streaming treats apart: a table, a stored buffer, a cache."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from blockstream.module.empty import empty
from blockstream.plugins import Choice, Plugins
from blockstream.plugins.choices import Chosen
from blockstream.run.config import RunConfig

WIDTH, WORDS, PASSES = 64, 20_000, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, seen=None):
        x = torch.tanh(self.fc(x)) * self.gain
        if seen is not None:  # as a key-value cache: the block reads and changes its input
            seen.append(x.clone())
            x = x + torch.stack(seen).mean(0)
        return x


class Text(nn.Module):
    """5 MB of table, gathered row by row, then two blocks."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, seen):
        x = x + self.shift
        for block in self.blocks:
            x = block(x, seen)
        return self.head(x)


def save(folder: Path) -> Path:
    """Write the weights of both stages, with a header that misaligns their data."""
    torch.manual_seed(0)
    for name, module in (("text", Text()), ("net", Net())):
        tensors = {k: torch.randn_like(v) * 0.2 for k, v in module.state_dict().items()}
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"pad": "x" * 5})
    return folder


class ToyPipeline:
    """Text once, then the net three times over its own outputs."""

    def __init__(self, folder: Path, during=lambda n: None) -> None:
        self.folder, self.during = folder, during

    def declare(self, session, run):
        with empty():
            text, net = Text().eval(), Net().eval()
        self.text = session.stage("text", text, self.folder / "text")
        self.net = session.stage("net", net, self.folder / "net", passes=PASSES)
        run.files.declare(["latents.safetensors"])

    @torch.inference_mode()
    def run(self, session, run):
        x, seen = self.text(torch.tensor([[7, 19_999, 3]])), []
        session.end("text")
        for n in range(PASSES):
            self.during(n)
            x = self.net(x + 0.1 * torch.randn(x.shape), seen)
        run.files.write("latents.safetensors", b"x")
        return {"sum": float(x.sum())}


def config(pipeline: ToyPipeline, arena: int = 5 * 20480, **more) -> RunConfig:
    """Return the config of a pipeline object."""
    plugins = Plugins()
    return RunConfig(
        pipeline=Chosen("pipeline", "toy", "builtin", Choice("toy", lambda _: pipeline)),
        policy=Chosen("policy", "auto", *plugins.find("policy", "auto")),
        sampler=Chosen("sampler", "euler", *plugins.find("sampler", "euler")),
        arena=arena,
        **more,
    )


class Flip:
    """Flips a bit of a parameter of one segment as it is loaded, `times` times or always."""

    def __init__(self, monkeypatch, stage: str, segment: str, param: str, times: int = 1 << 30) -> None:
        from blockstream.checkpoint.file_store import FileStore

        self.left = times
        begin = FileStore.begin
        flip = self

        def corrupted(store, load):
            loading, at, name = begin(store, load), load.stage, load.segment.name
            finish = loading.finish

            def flipped(*args):
                handle = finish(*args)
                if (at, name) == (stage, segment) and flip.left:
                    flip.left -= 1
                    # A bit of the first number's exponent, little-endian float32: it doubles or halves.
                    store.arena.view(handle.room)[handle.layout.tensors[param].offset + 2] ^= 0x80
                return handle

            loading.finish = flipped
            return loading

        monkeypatch.setattr(FileStore, "begin", corrupted)
