"""What a folder's config.json may say, and what else of a folder counts, as its own library has it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockstream
from blockstream.errors import BlockstreamError
from tests.support import toys
from tests.support.models import assert_same, save
from tests.support.toys import noise

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def changed(folder, to, **settings):
    """Copy a model's folder, its config with other settings."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    return to


NONSENSE = {
    "layers without end": (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers 1000000000, and the",
    ),
    "many layers": ({"num_hidden_layers": 10**5}, "num_hidden_layers 100000"),
    "width without end": ({"hidden_size": 10**12}, "hidden_size 1000000000000, more than any model"),
    "positions without end": ({"max_position_embeddings": 10**11}, "max_position_embeddings"),
    "no heads": ({"num_attention_heads": 0}, "LlamaForCausalLM cannot be built"),
    "a string for a number": ({"hidden_size": "wide"}, "LlamaForCausalLM cannot be built"),
    "no dtype": ({"dtype": "float17"}, "LlamaForCausalLM cannot be built"),
    "no class": ({"architectures": ["LlamaForEverything"]}, "names LlamaForEverything"),
    "no model": ({"architectures": ["LlamaConfig"]}, "names LlamaConfig"),
    "a base of models": ({"architectures": ["PreTrainedModel"]}, "no model but a base"),
    "no architecture": ({"architectures": None}, "names no architecture"),
    "architectures of another kind": ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
}


@pytest.mark.parametrize(("settings", "said"), NONSENSE.values(), ids=NONSENSE)
def test_a_config_of_nonsense_is_refused_by_name(settings, said, llama, tmp_path):
    folder = changed(llama, tmp_path / "c", **settings)
    with pytest.raises(BlockstreamError, match=said), blockstream.from_pretrained(folder):
        pass


def test_a_folders_generation_settings_are_those_of_its_library(llama, tmp_path):
    folder = changed(llama, tmp_path / "c")
    config = transformers.GenerationConfig(eos_token_id=[2, 7], max_new_tokens=5, pad_token_id=0)
    config.save_pretrained(folder)
    want = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()
    with blockstream.from_pretrained(folder) as m:
        assert m.generation_config.to_dict() == want


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"]
)
@pytest.mark.parametrize("outer", ["", "module."])
def test_names_with_a_wrapper_inside_are_those_without(wrapper, outer, tmp_path):
    resident = toys.Stack().eval()
    folder = save(resident, tmp_path / "c")
    path = next(folder.glob("*.safetensors"))
    inside = {outer + k.replace("blocks.1.", f"blocks.1.{wrapper}."): v for k, v in load_file(path).items()}
    save_file(inside, path)
    with blockstream.stream(toys.Stack, folder) as m, torch.no_grad():
        assert torch.allclose(m(noise()), resident(noise()), atol=1e-6)


class Counted(toys.Stack):
    """Keeps state of its own beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.tensor([3.0])

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state) -> None:
        self.calls = state


def test_a_modules_extra_state_is_loaded_and_given_back(tmp_path):
    resident = Counted().eval()
    resident.calls = torch.tensor([8.0])
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    with blockstream.empty():
        module = Counted().eval()
    with blockstream.stream(module, tmp_path / "c.pt") as m:
        m(noise())
        assert float(m.calls) == 8.0
    assert float(module.calls) == 3.0


class Table(nn.Module):
    """Adds a table of positions that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(0, 1, toys.D), persistent=False)
        self.register_buffer("scale", torch.full((toys.D,), 0.3))
        self.stack = toys.Stack()

    def forward(self, x):
        return self.stack(x * self.scale + self.positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_take_the_dtype_that_is_named_and_come_back_in_their_own(dtype, tmp_path):
    resident = Table().eval()
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    with blockstream.empty():
        module = Table().eval()
    x = noise().to(dtype)
    with blockstream.stream(module, tmp_path / "c.pt", dtype=dtype) as m, torch.no_grad():
        assert torch.allclose(m(x), resident.to(dtype)(x), atol=1e-2)
        assert {b.dtype for b in m.buffers()} == {dtype}
    assert {b.dtype for b in module.buffers()} == {torch.float32}


class Bare(nn.Module):
    """Holds weights and has no forward: whoever uses it takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(toys.D, 4 * toys.D), nn.Linear(4 * toys.D, toys.D)


class Reaches(nn.Module):
    """Reaches past containers that have no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Bare() for _ in range(4))

    def forward(self, x):
        for level in self.levels:
            x = x + level.down(torch.relu(level.up(x)))
        return x


@pytest.mark.parametrize("arena", ["64KiB", "1MiB"])
def test_containers_without_a_forward_are_no_segments(arena, tmp_path):
    resident = Reaches().eval()
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    with blockstream.stream(Reaches, tmp_path / "c.pt", arena=arena) as m, torch.no_grad():
        for _ in range(3):
            assert_same(m(noise()), resident(noise()))
        assert not any(
            s.name.count(".") == 1 for s in blockstream.session(m).plan.schedule.stages[0].segments
        )


def test_an_adapter_added_after_the_stage_is_left_alone(tmp_path):
    resident = toys.Stack().eval()
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    with blockstream.open(arena="40KiB") as s, torch.no_grad():
        m = s.stage("m", toys.Stack, tmp_path / "c.pt")
        m.adapter = nn.Linear(toys.D, toys.D)
        assert torch.allclose(m(noise()), resident(noise()), atol=1e-6)
        assert m.adapter(noise()).shape == noise().shape
