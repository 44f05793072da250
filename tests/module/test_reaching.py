"""What a forward takes past the module that holds it is there whenever it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import blockstream
from blockstream.module.reaching import reached
from tests.support import toys
from tests.support.toys import D, noise

VOCABULARY = 100_000  # a table that is gathered row by row where nothing else uses it


class Head(nn.Module):
    """Multiplies by its table at the end, as heads without a layer of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(toys.Block() for _ in range(4))

    def run(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Transposed(Head):
    def forward(self, ids):
        return self.run(ids) @ self.emb.weight.T


class Linear(Head):
    def forward(self, ids):
        return functional.linear(self.run(ids), self.emb.weight)


class ByAMethod(Head):
    def logits(self, x):
        table = self.emb.weight
        return torch.einsum("bsd,vd->bsv", x, table)

    def forward(self, ids):
        return self.logits(self.run(ids))


class Declared(Transposed):
    def stream_order(self):
        return ["emb", *(f"blocks.{i}" for i in range(4))]


class Asks(Head):
    """Asks its table what it is, and gathers from it."""

    def forward(self, ids):
        assert isinstance(self.emb.weight, torch.Tensor)
        return self.run(ids).to(self.emb.weight.dtype)


@pytest.mark.parametrize("make", [Transposed, Linear, ByAMethod, Declared, Asks])
@pytest.mark.parametrize("arena", ["7MiB", "16MiB"])
def test_a_table_that_is_used_outside_its_module_is_there(make, arena, tmp_path):
    resident = make().eval()
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    ids = torch.arange(8)[None]
    with blockstream.stream(make, tmp_path / "c.pt", arena=arena) as m, torch.no_grad():
        want = resident(ids)
        for _ in range(2):
            assert torch.allclose(m(ids), want, atol=1e-5)


@pytest.mark.parametrize(("make", "taken"), [(Transposed, True), (ByAMethod, True), (Asks, False)])
def test_what_is_only_asked_is_not_taken(make, taken):
    module = make()
    assert (id(module.emb.weight) in reached(module)) is taken


class TakesFromItsBlock(toys.Stack):
    """Adds a weight of its last block to what comes out."""

    def forward(self, x):
        return super().forward(x) + self.last.norm.bias

    def __init__(self) -> None:
        super().__init__()
        self.last = self.blocks[3]


def test_a_weight_of_a_block_that_the_model_takes_stays(tmp_path):
    resident = TakesFromItsBlock().eval()
    torch.save(resident.state_dict(), tmp_path / "c.pt")
    with blockstream.stream(TakesFromItsBlock, tmp_path / "c.pt", arena="40KiB") as m, torch.no_grad():
        assert torch.allclose(m(noise()), resident(noise()), atol=1e-6)
