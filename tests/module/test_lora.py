"""Adapters of a file beside a module's layers: the bits of peft, in every layout of keys; refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockstream
from blockstream.errors import ConfigError
from blockstream.module.lora import load_lora, load_loras
from tests.support.models import aligned

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.to_out(torch.tanh(self.to_q(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder of weights and two adapters, and what peft gives with both, scaled, in memory."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    net = aligned(Net())
    save_file(dict(net.state_dict()), folder / "net.safetensors")
    for name, targets, alpha in (("a", ["to_q"], 8), ("b", ["to_q", "blocks.1.to_out"], 3)):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        other = Net()
        other.load_state_dict(net.state_dict())
        peft.get_peft_model(other, config).save_pretrained(folder / name)
    model = peft.PeftModel.from_pretrained(net, folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    model.base_model.set_adapter(["a", "b"])
    for part in model.modules():
        if hasattr(part, "set_scale"):
            for name, scale in (("a", 0.5), ("b", 2.0)):
                if name in part.scaling:
                    part.set_scale(name, scale)
    with torch.no_grad():
        return folder, model(X)


def other_layout(folder, before, after, alpha, to):
    """Save an adapter under other keys, its alphas in the file."""
    held = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, value in held.items():
        path, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        found[f"{before}{path}.{after[side[-1]]}.weight"] = value
        found[f"{before}{path}.alpha"] = torch.tensor(float(alpha))
    save_file(found, to)
    return to


def test_the_bits_of_peft_whatever_the_layout(made, tmp_path):
    folder, want = made
    diffusers = {"A": "lora_A", "B": "lora_B"}
    for a, b in (
        (folder / "a", folder / "b" / "adapter_model.safetensors"),
        (
            other_layout(folder / "a", "transformer.", diffusers, 8, tmp_path / "a.safetensors"),
            other_layout(folder / "b", "", {"A": "lora_down", "B": "lora_up"}, 3, tmp_path / "b.safetensors"),
        ),
    ):
        with blockstream.stream(Net, folder / "net.safetensors", arena="16KiB") as net, torch.no_grad():
            load_loras(net, [(a, 0.5), (b, 2.0)])
            for _ in range(2):
                assert torch.equal(net(X), want)


def test_what_does_not_fit_is_refused_by_name(made, tmp_path):
    folder, _ = made
    held = load_file(folder / "a" / "adapter_model.safetensors")
    first, *rest = held
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora" / "adapter_config.json").write_text('{"use_dora": true}')
    save_file(held, tmp_path / "dora" / "adapter_model.safetensors")
    for tensors, said in (
        ({k.replace("to_q", "to_k"): v for k, v in held.items()}, "to_k.* no layer of Net; the nearest is"),
        ({k: held[k] for k in rest}, f"has no lora_{'A' if 'lora_A' in first else 'B'} of"),
        ({k: v.repeat(2, 2) for k, v in held.items()}, r"has shape .* and needs"),
        ({**held, "blocks.0.to_q.lora_magnitude_vector": held[first].clone()}, "is no key of a low-rank"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ConfigError, match=rf"lora: .*x\.safetensors: .*{said}"):
            load_lora(Net(), tmp_path / "x.safetensors", "x")
    for path, said in (
        ("nowhere", "there is no such file"),
        ("dora", "has use_dora True, which is not read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_lora(Net(), tmp_path / path, "x")
