"""The plugins of `blockstream plugins new` that bring networks: a pipeline, a model family."""

from __future__ import annotations

from .package_kinds import Kind

PIPELINE = Kind(
    summary="A pipeline: samples of a small network, streamed, saved, resumed and reported by the engine.",
    yaml="pipeline: $name\nmodel: weights\nseeds: [0, 1]",
    module='''\
"""$summary"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from blockstream.plugins import Choice, hookimpl


class Options(BaseModel):
    """Every key of the YAML that is not the engine's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path = Field(description="folder of the weights")
    seeds: list[int] = Field([0], min_length=1, description="one sample each")
    steps: int = Field(8, ge=1, description="steps of a sampling")
    save_every: int = Field(2, ge=1, description="steps", json_schema_extra={"numerics": False})

    @field_validator("model")
    @classmethod
    def _absolute(cls, path: Path, info: ValidationInfo) -> Path:
        return (Path((info.context or {}).get("base") or "") / path).absolute()


def _build(options):
    from .pipeline import Towers  # here, not above: listing plugins must not import torch

    return Towers(options)


@hookimpl
def pipelines():
    """List the pipeline: a config names it, its options are checked, `build` makes it."""
    return [Choice("$name", _build, Options, "samples of a tower of linear layers")]
''',
    files={
        "pipeline.py": '''\
"""The network, the flow that a sampler goes through, and the pipeline."""

from __future__ import annotations

import torch
from safetensors.torch import save
from torch import nn

import blockstream
from blockstream.plugins import current_run
from blockstream.streaming.model_plan import imagined_model

WIDTH = 64


class Tower(nn.Module):
    """Six blocks: each is a segment, loaded and released by itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x, t):
        """Return [1, WIDTH]: the velocity at x [1, WIDTH] and time t."""
        for block in self.blocks:
            x = torch.tanh(block(x)) + t
        return x


class TowerFlow:
    """What a sampler knows of the model. See `blockstream.plugins.Flow`."""

    straight = True

    def __init__(self, model, steps):
        self.model, self.times = model, [1 - i / steps for i in range(steps)]

    def velocity(self, z, i):
        """Return the velocity at times[i]: one pass of the model. Attention transforms ask which it is."""
        context = current_run()
        context.step, context.steps = i, len(self.times)
        return self.velocity_at(z, self.times[i])

    def velocity_at(self, z, t):
        """Return the velocity at any time."""
        return self.model(z, t)

    def advance(self, z, v, i, to):
        """Return z moved along v from times[i] to times[to]; the index after the last is t = 0."""
        return z - v * (self.times[i] - (self.times[to] if to < len(self.times) else 0.0))

    def remaining(self, n): ...

    def step_done(self, i, z, memory): ...

    def state(self):
        """Return what a resumed run needs beside z: nothing."""
        return {}

    def load_state(self, state): ...


class Towers:
    """One sample a seed. See `blockstream.plugins.Pipeline`."""

    def __init__(self, options):
        self.options = options

    def declare(self, session, run):
        """Name the files, and add the stage with the passes that are left."""
        o = self.options
        self.names = [f"{n:04d}/sample.safetensors" for n in range(len(o.seeds))]
        self.left = [n for n, name in enumerate(self.names) if not run.files.is_whole(name)]
        run.files.declare(self.names, [f"{n:04d}" for n in self.left])
        if not self.left:
            return
        most = run.passes(o.steps)[1]
        done = sum(run.sampled(f"{n:04d}", o.steps, (1, WIDTH))[1] for n in self.left)
        self.tower = session.stage(
            "tower",
            Tower,
            self._checkpoint(run),
            passes=blockstream.AtMost(max(1, most * len(self.left) - done)),
            example_inputs=(torch.empty(1, WIDTH), 1.0),
        )

    def _checkpoint(self, run):
        """Return the weights; in a plan, where they are not there yet, what they would be."""
        if run.planning and not self.options.model.exists():
            with blockstream.empty():
                return imagined_model(Tower(), "fp32", self.options.model)
        return run.checkpoint(self.options.model)

    @torch.inference_mode()
    def run(self, session, run):
        """Make the samples that are left; return what report.json holds under "output"."""
        for n in self.left:
            generator = torch.Generator().manual_seed(self.options.seeds[n])
            z = torch.randn(1, WIDTH, generator=generator)
            flow = TowerFlow(self.tower, self.options.steps)
            with run.phase("sample"):
                z, _ = run.sample(f"{n:04d}", flow, z, save_every=self.options.save_every)
            run.files.write(self.names[n], save({"z": run.check(f"sample {n}", z)}))
            run.files.drop(f"{n:04d}")
        return {"files": self.names}
'''
    },
    imports="""\
import pytest
import torch
from $module.pipeline import WIDTH, Tower, TowerFlow
from safetensors.torch import load_file, save_file

from blockstream.errors import ConfigError
from blockstream.plugins import Plugins, hookimpl
from blockstream.run import runner
from blockstream.run.config import load_config
from blockstream.verify.comparison import verify""",
    found='assert plugins.offers("pipeline", "$name")["$name"].options(model="weights").seeds == [0]',
    tests='''
@pytest.fixture(name="config")
def _config(tmp_path):
    """A config of two samples, in an arena that holds half of the weights beside it."""
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    save_file(Tower().state_dict(), tmp_path / "weights" / "model.safetensors")
    path = tmp_path / "towers.yaml"
    path.write_text("pipeline: $name\\nmodel: weights\\nseeds: [3, 4]\\narena: 80KiB\\nthreads: 1\\n")
    return path


class StopAt:
    """Stops a run as a pass begins, and counts the passes that ended."""

    def __init__(self, pass_index=None):
        self.at, self.passes = pass_index, 0

    @hookimpl
    def pass_started(self, pass_index):
        if pass_index == self.at:
            raise KeyboardInterrupt

    @hookimpl
    def pass_finished(self):
        self.passes += 1


def samples(out):
    return [load_file(out / f"{n:04d}" / "sample.safetensors")["z"] for n in range(2)]


def test_a_run_makes_what_the_module_makes_in_memory(config, tmp_path):
    runner.run(load_config(config), tmp_path / "out")
    tower = Tower()
    tower.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"))
    flow = TowerFlow(tower, 8)
    with torch.inference_mode():
        for seed, made in zip((3, 4), samples(tmp_path / "out"), strict=True):
            z = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
            for i in range(8):
                z = flow.advance(z, flow.velocity(z, i), i, i + 1)
            assert torch.equal(made, z)


@pytest.mark.parametrize(("stop", "left"), [(0, 16), (5, 12), (11, 6)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config, tmp_path, stop, left):
    runner.run(load_config(config), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.run(load_config(config), tmp_path / "out", observers=[StopAt(stop)])
    rest = StopAt()
    runner.run(load_config(config), tmp_path / "out", resume=True, observers=[rest])
    assert rest.passes == left
    assert all(map(torch.equal, samples(tmp_path / "out"), samples(tmp_path / "whole")))
    assert not (tmp_path / "out" / "state").exists()


def test_a_run_does_not_go_on_with_other_weights(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runner.run(load_config(config), tmp_path / "out", observers=[StopAt(5)])
    path = tmp_path / "weights" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="begun with another tower"):
        runner.run(load_config(config), tmp_path / "out", resume=True)


def test_streamed_is_resident_bit_for_bit(config):
    assert verify(load_config(config))["equal"]


def test_a_plan_needs_no_weights(config, tmp_path):
    there = runner.plan(load_config(config))
    (tmp_path / "weights" / "model.safetensors").unlink()
    (tmp_path / "weights").rmdir()
    gone = runner.plan(load_config(config))
    assert [stage["name"] for stage in gone["stages"]] == [stage["name"] for stage in there["stages"]]
''',
)

FAMILY = Kind(
    summary="A model family: an architecture that synth, pack and plan know by its name.",
    shell="blockstream plan $name\n    blockstream synth $name FOLDER",
    module='''\
"""$summary"""

from __future__ import annotations

from blockstream.plugins import ModelFamily, hookimpl

#: What config.json holds of the full size.
CONFIG = {"model_type": "$name", "width": 256, "depth": 6, "words": 1000}


def _module(config=CONFIG):
    import torch  # here, not above: listing families must not import it

    from .network import Net

    with torch.device("meta"):
        return Net(config["width"], config["depth"], config["words"])


def _from_config(config):
    """Return the module of a folder's config.json, None when it is another architecture's."""
    return _module(config) if config.get("model_type") == "$name" else None


def _write_extras(folder):
    """Write what a folder has beside its weights: a vocabulary."""
    (folder / "vocabulary.txt").write_text("\\n".join(f"word{i}" for i in range(CONFIG["words"])) + "\\n")


@hookimpl
def model_families():
    """List the family; its parameters are on the meta device, so that nothing is allocated."""
    summary = "6 residual blocks of width 256"
    return [ModelFamily("$name", _module, summary, CONFIG, _from_config, _write_extras)]
''',
    files={
        "network.py": '''\
"""The network: an embedding, residual blocks, a head."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """One residual block."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """Return x [B, L, width], something added."""
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """What the family's folders hold."""

    def __init__(self, width, depth, words):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, words)

    def forward(self, ids):
        """Return logits [B, L, words] of ids [B, L]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
'''
    },
    imports="""\
import json

import pytest
import torch
from $module import CONFIG
from $module.network import Net
from safetensors.torch import load_file

import blockstream
from blockstream.cli.main import main
from blockstream.plugins import Plugins""",
    found='assert plugins.family("$name").module().head.weight.is_meta',
    tests='''
@pytest.fixture(name="folder")
def _folder(tmp_path):
    """A folder of random weights, written by the family's name."""
    assert main(["synth", "$name", str(tmp_path / "made")]) == 0
    return tmp_path / "made"


def test_a_folder_of_the_family_has_its_config_and_its_vocabulary(folder):
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert len((folder / "vocabulary.txt").read_text().split()) == CONFIG["words"]


@pytest.mark.parametrize("what", ["$name", "folder"])
def test_it_can_be_planned_by_its_name_and_by_its_folder(folder, capsys, what):
    capsys.readouterr()
    assert main(["plan", str(folder) if what == "folder" else what, "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["segments"] >= CONFIG["depth"]


def test_what_was_written_streams_to_the_bits_of_the_module_in_memory(folder):
    net = Net(CONFIG["width"], CONFIG["depth"], CONFIG["words"])
    net.load_state_dict(load_file(folder / "model.safetensors"))
    ids = torch.tensor([[1, 2, 999]])
    with torch.inference_mode(), blockstream.stream(
        lambda: Net(CONFIG["width"], CONFIG["depth"], CONFIG["words"]), folder, arena="4MiB"
    ) as streamed:
        assert torch.equal(streamed(ids), net(ids))


def test_a_config_of_another_architecture_is_left_to_others():
    assert Plugins().family("$name").from_config({"model_type": "another"}) is None
''',
)
