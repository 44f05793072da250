"""torch.compile of streamed models: hooks stay outside the graphs, blocks share one, bits are the same."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import BudgetError, ModelError

N = 10  # more than torch._dynamo.config.recompile_limit
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(N))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def whole(module, backend):
    return torch.compile(module, backend=backend)


def blocks(module, backend):
    for block in module.blocks:
        block.compile(backend=backend)
    return module


def wrapped(module, backend):
    for i, block in enumerate(module.blocks):
        module.blocks[i] = torch.compile(block, backend=backend)
    return module


def counted(run):
    """Return what a run gives and the number of graphs it compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        made = run()
    assert not counters["recompile_limit"]
    return made, counters["stats"]["unique_graphs"]


def streamed(folder, how, when, backend):
    """Return what a compiled net gives twice while it streams."""

    def make():
        return how(Net().eval(), backend) if when == "before" else Net().eval()

    with blockstream.stream(make, folder, arena="20KiB") as module:
        compiled = how(module, backend) if when == "inside" else module
        return [compiled(X) for _ in range(2)]


@pytest.mark.parametrize(
    ("how", "when"),
    [(whole, "inside"), (blocks, "before"), (blocks, "inside"), (wrapped, "before"), (wrapped, "inside")],
)
def test_compiled_blocks_are_one_graph_and_give_the_resident_bits(how, when, twins):
    resident, folder = twins(Net)
    want, _ = counted(lambda: blocks(resident, "eager")(X))
    got, graphs = counted(lambda: streamed(folder, how, when, "eager"))
    assert all(torch.equal(x, want) for x in got)
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", [whole, blocks])
def test_inductor_gives_the_bits_of_the_resident_blocks(how, twins):
    resident, folder = twins(Net)
    want, _ = counted(lambda: blocks(resident, "inductor")(X))
    got, graphs = counted(lambda: streamed(folder, how, "inside", "inductor"))
    assert all(torch.equal(x, want) for x in got)
    assert graphs == 1


def test_a_block_stays_compiled_once_it_no_longer_streams(twins):
    resident, folder = twins(Net)
    with torch.no_grad(), blockstream.stream(lambda: Net().eval(), folder, arena="20KiB") as module:
        blocks(module, "eager")
        module(X)
    with pytest.raises(ModelError, match=r"blocks\.0 was streamed"):
        module.blocks[0](X)
    module.to_empty(device="cpu").load_state_dict(resident.state_dict())
    with torch.no_grad():
        assert torch.equal(module(X), resident(X))
    assert all(block._compiled_call_impl is not None for block in module.blocks)


def test_a_compiled_block_stays_whole_and_one_in_pieces_is_not_compiled(twins):
    _, folder = twins(Net)

    def make():
        return blocks(Net().eval(), "eager")

    with blockstream.open(arena="13KiB") as s, pytest.raises(BudgetError):
        s.stage("m", make, folder)
        s.draft()
    with torch.no_grad(), blockstream.stream(lambda: Net().eval(), folder, arena="13KiB") as module:
        module(X)
        with pytest.raises(ModelError, match="streamed in pieces"):
            module.blocks[0].compile(backend="eager")


def test_one_graph_of_the_whole_is_refused(twins):
    _, folder = twins(Net)
    with torch.no_grad(), blockstream.stream(lambda: Net().eval(), folder, arena="20KiB") as module:
        whole = torch.compile(module, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="blocks are on disk"):
            whole(X)
