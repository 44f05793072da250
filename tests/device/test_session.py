"""Modules that compute on a device, a fake one: the bits of the resident module, within both budgets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.device.budget import MARGIN_NBYTES, WORKSPACE_NBYTES, WORKSPACE_PART
from blockstream.device.fake import FakeDevice
from blockstream.errors import BudgetError, ConfigError
from blockstream.module.rehearsal import rehearse
from blockstream.streaming.stage import sent_to

KIND = pytest.mark.parametrize("copies", ["late", "early"])


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.up, self.down = nn.Linear(n, 3 * n), nn.Linear(3 * n, n)
        self.register_buffer("scale", torch.rand(n))

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, n=64, blocks=6, order=None):
        super().__init__()
        self.first = nn.Linear(n, n)
        self.blocks = nn.ModuleList(Block(n) for _ in range(blocks))
        self.last = nn.Linear(n, n)
        self._order = order or range(blocks)

    def forward(self, x):
        x = self.first(x)
        for i in self._order:
            x = self.blocks[i](x)
        return self.last(x)


@pytest.fixture(name="net")
def _net(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net().requires_grad_(False)
        inputs = torch.randn(4, 5, 64)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    return module, tmp_path / "model.safetensors", inputs


def block_nbytes(module):
    return sum(p.nbytes for p in module.blocks[0].parameters())


def stream(net, device, **options):
    _, path, _ = net
    options = {"device_budget": "64MiB", "budget": "8GiB", **options}
    return blockstream.stream(Net, path, device=device, **options)


def device_for(net, blocks, copies="late", known=True, **options):
    """Return a fake device and the budget in which so many blocks fit beside two slots.

    Without example inputs half of what is left is kept for activations: it is not `known` what they need.
    """
    module, _, x = net
    outside = sum(p.nbytes for m in (module.first, module.last) for p in m.parameters())
    room = (2 + blocks) * (block_nbytes(module) + (8 << 10)) + outside + (16 << 10)
    if not known:
        return FakeDevice(copies=copies, **options), 2 * (room + MARGIN_NBYTES)
    activations = WORKSPACE_PART * rehearse(module, x).activations_nbytes + WORKSPACE_NBYTES
    return FakeDevice(copies=copies, **options), room + int(activations) + MARGIN_NBYTES


@KIND
@pytest.mark.parametrize("blocks", [0, 2, 6])
@pytest.mark.parametrize("arena", [None, "512KiB"])
def test_the_bits_are_those_of_the_resident_module(net, copies, blocks, arena):
    module, _, x = net
    device, budget = device_for(net, blocks, copies)
    with torch.no_grad():
        wanted = module(x)
        with stream(net, device, device_budget=budget, arena=arena, example_inputs=x, passes=4) as m:
            session = blockstream.session(m)
            for _ in range(4):
                assert torch.equal(m(x), wanted)
            report = session.report()
            assert len(session.plan.stages[0].retained) >= blocks
    assert report["device"]["budget"]["held"] and report["budget"]["held"]
    assert report["unplanned"] == 0 and report["device"]["host"]["unplanned"] == 0
    assert not device.registered


def unplanned(session):
    report = session.report()
    return report["unplanned"], report["device"]["host"]["unplanned"]


def test_an_order_learnt_in_the_first_pass_is_followed_on_both_tiers(net):
    module, _, x = net
    order = [5, 3, 4, 0, 1, 2, 0]
    module._order = order
    device, budget = device_for(net, 1, known=False)
    with torch.no_grad():
        wanted = module(x)
        with stream(net, device, device_budget=budget, passes=9) as m:
            m._order = order
            session = blockstream.session(m)
            for _ in range(6):
                assert torch.equal(m(x), wanted)
            learnt = unplanned(session)
            for _ in range(2):
                assert torch.equal(m(x), wanted)
            assert unplanned(session) == learnt


def test_what_a_pass_leaves_out_is_learnt_and_what_is_kept_then_is_loaded(net):
    module, _, x = net
    module._order = [3, 4, 5]
    device, budget = device_for(net, 1, known=False)
    with torch.no_grad():
        wanted = module(x)
        with stream(net, device, device_budget=budget) as m:
            m._order = [3, 4, 5]
            for _ in range(6):
                assert torch.equal(m(x), wanted)
            session = blockstream.session(m)
            learnt = unplanned(session)
            for _ in range(2):
                assert torch.equal(m(x), wanted)
            assert unplanned(session) == learnt


def test_stages_share_both_budgets_in_one_schedule(net):
    module, path, x = net
    device, budget = device_for(net, 2)
    with torch.no_grad():
        wanted = module(x)
        with blockstream.Session("8GiB", device=device, device_budget=budget) as session:
            one, two = (session.stage(n, Net, path, passes=3, example_inputs=x) for n in ("a", "b"))
            for m in (one, two):
                for _ in range(3):
                    assert torch.equal(m(x), wanted)


def test_a_device_budget_that_cannot_hold_two_slots_is_refused_with_the_least(net):
    device, _ = device_for(net, 0)
    x = net[2]
    tight = pytest.raises(BudgetError, match=r"device_budget 32 MiB on fake .*the least is \d+ MiB")
    with torch.no_grad(), stream(net, device, device_budget="32MiB", example_inputs=x) as m, tight:
        m(x)


def test_what_is_no_device_is_refused_by_name(net):
    for name, said in {
        "mps": "unified memory",
        "xpu": "streams, events",
        "gpu": "write auto, cpu, cuda",
        "cuda": "finds no CUDA device",
    }.items():
        if name == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=said), stream(net, name):
            pass
    with pytest.raises(ConfigError, match="without a device"), stream(net, None, device_budget="1GiB"):
        pass


def test_auto_takes_the_processor_where_there_is_no_device(net):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    module, path, x = net
    with torch.no_grad(), blockstream.stream(Net, path, device="auto") as m:
        assert torch.equal(m(x), module(x))


def test_memory_that_cannot_be_registered_is_said_in_the_report(net):
    module, _, x = net
    device, budget = device_for(net, 1, known=False, refuses="no more")
    with torch.no_grad(), stream(net, device, device_budget=budget, passes=2) as m:
        assert torch.equal(m(x), module(x))
        assert blockstream.session(m).report()["device"]["pageable"] == "no more"


@dataclass(frozen=True)
class Told:
    states: torch.Tensor
    note: str = ""


def test_what_is_sent_is_sent_whatever_holds_it_and_what_holds_nothing_elsewhere_stays_itself():
    away, here = torch.device("meta"), torch.zeros(2)
    there, cache = torch.zeros(2, device="meta"), []
    told = sent_to(away, Told(here, "so"))
    assert told.states.device == away and told.note == "so"
    assert sent_to(away, (here, cache))[1] is cache
    assert [t.device for t in sent_to(away, {"a": [here], "b": there})["a"]] == [away]
    for held in (told, [there, "x"], {"a": (there,)}, Told):
        assert sent_to(away, held) is held


def test_a_session_is_judged_by_its_own_peak_not_by_one_before_it(net):
    x = net[2]
    device, budget = device_for(net, 0, known=False)
    other = device.empty(2 * budget)
    del other
    assert device.memory().peak_nbytes > budget
    with torch.no_grad(), stream(net, device, device_budget=budget) as m:
        m(x)
        held = blockstream.session(m).report()["device"]["budget"]
    assert held["held"] and held["peak_nbytes"] <= budget
