"""Blocks are cut where that saves time, and only where each piece is known to be called by itself."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockstream
from blockstream.streaming import costs, cuts
from blockstream.streaming.known import Known
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import least_of, streamed
from tests.support.toys import noise

D, BLOCKS, PASSES = 128, 8, 12


class Deep(toys.Stack):
    """Blocks of two large layers."""

    def __init__(self) -> None:
        super().__init__(BLOCKS, D)


class _Direct(toys.Block):
    def forward(self, x: Tensor) -> Tensor:
        up = functional.linear(self.norm(x), self.up.weight, self.up.bias)
        return x + self.down(functional.gelu(up))


class Direct(Deep):
    """Its blocks use a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Direct(D) for _ in range(BLOCKS))


class _Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]  # not registered: a layer of another branch
        self.out = nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.gelu(self.inner[0](x)))


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, 2 * D)
        self.down = _Inside(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(x)


class Nested(Deep):
    """One child of a block calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Nested() for _ in range(BLOCKS))


class _Heavy(toys.Block):
    def __init__(self) -> None:
        super().__init__(D)
        self.own = nn.Parameter(torch.randn(16 * D, D) / D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(x, self.own).mean()


class Heavy(Deep):
    """Most of a block lies beside its children: cut, it would stay resident, and have no room."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Heavy() for _ in range(BLOCKS))


@pytest.fixture(autouse=True)
def small_blocks_count(monkeypatch):
    """Have loads of tiny blocks cost what those of large ones do beside compute and visits."""
    monkeypatch.setattr(cuts, "CUT_NBYTES", 1 << 16)
    monkeypatch.setattr(costs, "VISIT_S", 0)


@contextmanager
def half_of(factory, folder, slots=None, policy="auto", **options):
    """Yield the streamed module in an arena of the least and about half of its blocks."""
    room = 3 * least_of(factory, folder)
    with torch.no_grad(), blockstream.Session(arena=room, slots=slots, policy=policy) as s:
        yield s.stage("m", factory, folder, **options)


def names(module) -> set[str]:
    return {s.name for s in blockstream.session(module).plan.schedule.stages[0].segments}


def test_blocks_are_cut_where_their_slots_take_what_could_be_retained(twins):
    resident, folder = twins(Deep)
    with torch.no_grad():
        want = resident(noise(3, D))
    read = {}
    for slots, cut in ((None, True), (2, False)):
        with half_of(Deep, folder, slots, passes=PASSES, example_inputs=noise(3, D)) as m:
            assert ("blocks.0.up" in names(m)) == cut
            assert ("blocks.0" in names(m)) != cut
            read[cut] = blockstream.session(m).plan.predicted.read_nbytes
            for _ in range(PASSES):
                assert_same(m(noise(3, D)), want)
    assert read[True] < 0.97 * read[False]


@pytest.mark.parametrize(
    "options",
    [
        {"passes": PASSES},
        {"passes": 1, "example_inputs": noise(3, D)},
        {"passes": PASSES, "example_inputs": noise(3, D), "slots": 3},
        {"passes": PASSES, "example_inputs": noise(3, D), "policy": "none"},
    ],
    ids=["order not known", "one pass", "slots asked for", "nothing is retained"],
)
def test_blocks_stay_whole(twins, options):
    _, folder = twins(Deep)
    with half_of(Deep, folder, **options) as m:
        assert "blocks.0" in names(m)


def test_blocks_stay_whole_where_all_fit(twins):
    _, folder = twins(Deep)
    room = 100 * least_of(Deep, folder)
    with streamed(Deep, folder, room, passes=PASSES, example_inputs=noise(3, D)) as m:
        assert "blocks.0" in names(m)


@pytest.mark.parametrize("factory", [Direct, Nested, Heavy], ids=lambda f: f.__name__)
def test_blocks_that_cannot_be_told_by_their_pieces_stay_whole(twins, factory):
    resident, folder = twins(factory)
    with torch.no_grad():
        want = resident(noise(3, D))
    with half_of(factory, folder, passes=PASSES, example_inputs=noise(3, D)) as m:
        assert "blocks.0" in names(m)
        for _ in range(3):
            assert_same(m(noise(3, D)), want)


def test_a_draft_and_the_run_have_the_same_cut(twins):
    _, folder = twins(Deep)
    with blockstream.Session(arena=3 * least_of(Deep, folder)) as s:
        s.stage("m", Deep, folder, PASSES, example_inputs=noise(3, D))
        draft = [x.name for x in s.draft().schedule.stages[0].segments]
        assert draft == [x.name for x in s.plan.schedule.stages[0].segments]
        assert "blocks.0" not in draft


SECONDS = {"a.0": 4.0, "a.1.up": 1.0, "a.1.down": 2.0, "a.10": 8.0, "(outside)": 0.5}


def test_what_was_measured_of_one_cut_tells_of_another():
    known = Known(load_s=SECONDS, execute_s=SECONDS)
    whole = known.of_cut({"rest": 1, "a.0": 30, "a.1": 30, "a.10": 30})
    assert whole.load_s == {"a.0": 4.0, "a.1": 3.0, "a.10": 8.0, "(outside)": 0.5}
    cut = known.of_cut({"a.0.up": 10, "a.0.down": 30, "a.1.up": 10, "a.1.down": 30, "a.10": 30})
    assert cut.execute_s == {
        "a.0.up": 1.0, "a.0.down": 3.0, "a.1.up": 1.0, "a.1.down": 2.0, "a.10": 8.0, "(outside)": 0.5
    }  # fmt: skip


def test_a_cut_that_nothing_was_measured_of_is_not_told():
    assert Known(execute_s={"a.0": 4.0}).of_cut({"b.0": 1, "a": 2}).execute_s == {"a": 4.0}
    assert Known().of_cut({"b.0": 1}).execute_s == {}
