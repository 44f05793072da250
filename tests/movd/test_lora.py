"""`lora:` of a config: adapters beside the denoiser, as in memory, saved and resumed by what they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import blockstream
from blockstream.errors import ConfigError
from blockstream.run import runner
from blockstream.run.config import make_config, read_config
from blockstream.verify.comparison import verify
from movd.options import TINY, ModelOptions
from movd.stdit3 import STDiT3, STDiT3Config

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SETS = ["prompts=[a red circle moving right]", "steps=2", "frames=1", "threads=1"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Return a file of adapters for two kinds of layers of the embedded denoiser."""
    folder = ModelOptions(path=TINY).folder("dit")
    with blockstream.empty():
        dit = STDiT3(STDiT3Config(**json.loads((folder / "config.json").read_text())))
    draw = torch.Generator().manual_seed(0)
    held = {}
    for name, part in dit.named_modules():
        if name.endswith((".attn.qkv", "cross_attn.proj")):
            held[f"transformer.{name}.lora_A.weight"] = torch.randn(4, part.in_features, generator=draw)
            held[f"transformer.{name}.lora_B.weight"] = torch.randn(part.out_features, 4, generator=draw) / 50
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(held, file)
    return file


def config(path, scale=0.8):
    return make_config(read_config("movd.yaml", [*SETS, f"lora=[{{path: {path}, scale: {scale}}}]"]))


def test_adapters_stream_as_they_run_in_memory_and_change_the_picture(lora, tmp_path):
    found = verify(config(lora))
    assert found["difference"] is None and {s["how"] for s in found["stages"]} == {"whole"}
    made = {}
    for scale in (0.0, 0.8):
        runner.run(config(lora, scale), tmp_path / str(scale))
        made[scale] = (tmp_path / str(scale) / "image.png").read_bytes()
    runner.run(make_config(read_config("movd.yaml", SETS)), tmp_path / "plain")
    assert made[0.8] != made[0.0] == (tmp_path / "plain" / "image.png").read_bytes()


def test_a_run_is_not_gone_on_with_other_adapters(lora, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(lora.read_bytes())
    runner.run(config(path), tmp_path / "out")
    (tmp_path / "out" / "image.png").unlink()
    (tmp_path / "out" / "report.json").unlink()
    path.write_bytes(lora.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ConfigError, match=r"was begun with another lora0 mine\.safetensors"):
        runner.run(config(path), tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="there is no such file"):
        runner.plan(config(tmp_path / "nowhere.safetensors"))
