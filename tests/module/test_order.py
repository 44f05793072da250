"""The order of a pass, found without running anything or touching what is the user's."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

import blockstream
from blockstream.module.order import order_of_calls
from blockstream.module.rehearsal import rehearse
from tests.support import models, toys
from tests.support.toys import D, noise


def empty(factory):
    with blockstream.empty():
        return factory().eval()


def fake_order(module, entries, inputs):
    rehearsed = rehearse(module, inputs)
    return None if rehearsed is None else order_of_calls(rehearsed.calls, module, entries)


def test_the_order_that_runs_is_found_on_fake_tensors():
    module = empty(toys.Zipped)
    entries = [f"{k}.{i}" for k in ("spatial", "temporal") for i in range(3)]
    found = fake_order(module, entries, (noise(),))
    assert [entries[i] for i in found] == toys.ZIPPED


@pytest.mark.parametrize(
    "inputs", [noise(), (noise(),), [noise()], {"x": noise()}], ids=["one", "args", "list", "kwargs"]
)
def test_inputs_are_one_argument_a_sequence_or_a_mapping(inputs):
    assert fake_order(empty(toys.Stack), ["blocks.1", "blocks.0"], inputs) == [1, 0]


def test_a_block_called_twice_is_in_the_order_twice():
    entries = [f"blocks.{i}" for i in range(4)]
    assert fake_order(empty(toys.Twice), entries, noise()) == [0, 1, 1, 2, 3, 0]


def test_real_models_run_on_fake_tensors():
    module = empty(models.hunyuan)
    entries = [f"single_transformer_blocks.{i}" for i in range(3)] + ["transformer_blocks.0", "proj_out"]
    inputs = {
        "hidden_states": torch.zeros(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.zeros(1, 5, 16),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.long),
        "pooled_projections": torch.zeros(1, 8),
        "guidance": torch.tensor([1.0]),
    }
    assert fake_order(module, entries, inputs) == [3, 0, 1, 2, 4]
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    assert fake_order(empty(models.t5_encoder), ["encoder.block.1", "encoder.block.0"], ids) == [1, 0]


def test_a_forward_that_needs_data_has_no_order_yet():
    assert fake_order(empty(toys.Skips), ["blocks.0"], noise()) is None
    assert fake_order(empty(toys.Stack), ["blocks.0"], noise(2, 7)) is None


class Nosy(nn.Module):
    """Counts, caches and keeps whatever its forward sees."""

    times = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(toys.Block() for _ in range(2))
        self.register_buffer("steps", torch.zeros(3))
        self.calls = 0
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        self.calls += 1
        Nosy.times += 1
        self.steps += 1
        self.seen.append(x)
        x = x + table(D)
        if cache is not None:
            cache["x"] = x
        for block in self.blocks:
            x = block(x)
        return x + torch.randn(D)


@lru_cache(maxsize=4)
def table(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)


def test_the_users_module_cache_tables_and_random_state_are_not_touched():
    table.cache_clear()
    module = empty(Nosy)
    seen = []
    module.blocks[0].register_forward_hook(lambda *_: seen.append("hook"))
    params, cache, x = dict(module.named_parameters()), {}, noise()
    before, state = x.clone(), torch.random.get_rng_state()
    assert fake_order(module, ["blocks.0", "blocks.1"], {"x": x, "cache": cache}) == [0, 1]
    assert (module.calls, Nosy.times, module.seen, cache, seen) == (0, 0, [], {}, [])
    assert torch.equal(module.steps, torch.zeros(3))
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p is params[n] for n, p in module.named_parameters())
    assert type(table(D)) is torch.Tensor
    assert torch.equal(table(D), torch.arange(D, dtype=torch.float32))


def test_what_a_cache_held_before_stays_right():
    table.cache_clear()
    mine = table(D)
    fake_order(empty(Nosy), ["blocks.0"], noise())
    assert torch.equal(table(D), mine)
    assert type(table(D)) is torch.Tensor


def test_nothing_is_computed():
    module = empty(lambda: nn.Sequential(*(nn.Linear(1 << 14, 1 << 14) for _ in range(3))))
    wide = torch.zeros(1).expand(1 << 14, 1 << 14)  # 1 GiB would it be real, and 9 TFLOP a layer
    assert fake_order(module, ["2", "0", "1"], wide) == [1, 2, 0]
