"""The pipeline of docs/write-a-pipeline.md, run as it stands there: it streams, resumes, is identified."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockstream.errors import ConfigError
from blockstream.plugins import Plugins, hookimpl
from blockstream.plugins.choices import Chosen
from blockstream.run import runner
from blockstream.run.config import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "write-a-pipeline.md"


@pytest.fixture(name="guide", scope="module")
def _guide():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType("guide")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture(name="config")
def _config(guide, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_file(guide.Tower().state_dict(), tmp_path / "model" / "model.safetensors")
    plugins = Plugins()
    (choice,) = guide.pipelines()
    options = guide.Options(model=tmp_path / "model", seeds=[3, 4])
    return RunConfig(
        pipeline=Chosen("pipeline", "towers", "builtin", choice, options),
        policy=Chosen("policy", "auto", *plugins.find("policy", "auto")),
        sampler=Chosen("sampler", "euler", *plugins.find("sampler", "euler")),
        arena=4 * 20480,
        threads=1,
    )


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


def test_it_makes_what_the_resident_module_makes(guide, config, tmp_path):
    runner.run(config, tmp_path / "out")
    tower = guide.Tower()
    tower.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    with torch.inference_mode():
        for seed, made in zip((3, 4), samples(tmp_path / "out"), strict=True):
            z = torch.randn(1, guide.WIDTH, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(made, config.sampler.build()(guide.TowerFlow(tower, 8), z))


@pytest.mark.parametrize(("stop", "left"), [(0, 16), (5, 12), (11, 6)])
def test_it_goes_on_where_it_was_stopped_to_the_same_bits(config, tmp_path, stop, left):
    runner.run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, tmp_path / "out", observers=[StopAt(stop)])
    rest = StopAt()
    runner.run(config, tmp_path / "out", resume=True, observers=[rest])
    assert rest.passes == left
    assert all(map(torch.equal, samples(tmp_path / "out"), samples(tmp_path / "whole")))
    assert not (tmp_path / "out" / "state").exists()


def test_other_weights_are_refused_though_it_never_named_them(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, tmp_path / "out", observers=[StopAt(5)])
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v + 1 for k, v in tensors.items()}, path)
    with pytest.raises(ConfigError, match="begun with another tower"):
        runner.run(config, tmp_path / "out", resume=True)
