"""What is no checkpoint of a module is refused when the two are matched, by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import blockstream
from blockstream.errors import CheckpointError
from tests.support import toys
from tests.support.models import assert_same, save
from tests.support.toys import noise


def state():
    return {k: v.clone() for k, v in toys.Stack().eval().state_dict().items()}


WRONG = {
    "int32": lambda w: torch.zeros(w.shape, dtype=torch.int32),
    "uint8": lambda w: torch.zeros(w.shape, dtype=torch.uint8),
    "bool": lambda w: torch.zeros(w.shape, dtype=torch.bool),
    "complex": lambda w: torch.zeros(w.shape, dtype=torch.complex64),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_tensors_that_are_no_weights_are_refused_by_name(wrong, suffix, tmp_path):
    weights = state()
    weights["blocks.1.up.weight"] = wrong(weights["blocks.1.up.weight"])
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    named = r"'blocks.1.up.weight' is \w+ and parameter 'blocks.1.up.weight' of Stack is float32"
    with pytest.raises(CheckpointError, match=named), blockstream.stream(toys.Stack, path):
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("asked", [None, "bf16"])
def test_weights_in_a_dtype_that_nothing_computes_in_are_converted(dtype, asked, tmp_path):
    stored = {k: v.to(dtype) for k, v in state().items()}
    path = tmp_path / "model.pt"
    torch.save(stored, path)
    resident = toys.Stack().eval()
    resident.load_state_dict({k: v.float() for k, v in stored.items()})
    x = noise()
    if asked:
        resident, x = resident.to(torch.bfloat16), x.to(torch.bfloat16)
    with blockstream.stream(toys.Stack, path, dtype=asked, arena="1MiB") as m, torch.no_grad():
        assert m(x).dtype is x.dtype
        assert torch.allclose(m(x), resident(x), atol=1e-6)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "unheard-of"])
def test_a_quantised_folder_is_refused_by_its_method(method, tmp_path):
    folder = save(toys.Stack().eval(), tmp_path / "c")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with (
        pytest.raises(CheckpointError, match=rf"quantization_config\.quant_method '{method}'"),
        blockstream.stream(toys.Stack, folder),
    ):
        pass


def test_an_index_that_misplaces_a_weight_that_is_needed_is_named(tmp_path):
    weights = state()
    lost = weights.pop("blocks.3.up.weight")
    save_file(weights, tmp_path / "a.safetensors")
    places = dict.fromkeys([*weights, "blocks.3.up.weight"], "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with (
        pytest.raises(CheckpointError, match=r"places 'blocks.3.up.weight' in a.safetensors, which does not"),
        blockstream.stream(toys.Stack, tmp_path),
    ):
        pass
    save_file({**weights, "blocks.3.up.weight": lost}, tmp_path / "a.safetensors")
    with blockstream.stream(toys.Stack, tmp_path) as m, torch.no_grad():
        want = toys.Stack().eval()
        want.load_state_dict({**weights, "blocks.3.up.weight": lost})
        assert_same(m(noise()), want(noise()))
