"""Whatever shares memory with weights that are about to go is an error that names the module."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import AliasError, ModelError
from blockstream.module.binding import tensors_in
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import streamed
from tests.support.toys import D, noise


class Leaky(toys.Stack):
    """Does something with the first block's output or weights after each of its forwards."""

    def __init__(self, leak) -> None:
        super().__init__()
        block = self.blocks[0]
        run = block.forward
        block.forward = lambda x: leak(block, run(x))


class Holder:
    def __init__(self, value) -> None:
        self.value = value


KEPT: list[object] = []
LEAKS = {
    "a weight": lambda b, x: (x, b.up.weight),
    "a view of a weight": lambda b, x: {"x": x, "w": b.up.weight[0]},
    "a transposed weight": lambda b, x: [x, [b.up.weight.t()]],
    "a weight in an object": lambda b, x: Holder({"deep": (b.norm.bias,)}),
    "a reshaped weight": lambda b, x: b.down.weight.view(-1),
    "a detached weight": lambda b, x: b.down.bias.detach(),
    "an expanded weight": lambda b, x: b.down.bias.expand(3, D),
    "numpy's view of a weight": lambda b, x: torch.from_numpy(b.down.bias.numpy()),
}


@pytest.mark.parametrize("policy", ["none", "prefix"])
@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_an_output_that_shares_memory_with_weights_is_refused(leak, policy, twins):
    _, folder = twins(toys.Stack)
    with (
        streamed(lambda: Leaky(leak), folder, policy=policy) as m,
        pytest.raises(AliasError, match=r"'blocks.0'.* its output.*segment 'blocks.0'.*clone"),
    ):
        m(noise())


CACHES = {
    "a parameter": lambda b: b.up.weight,
    "a view": lambda b: b.up.weight[1:],
    "a parameter in a cache": lambda b: {"k": [b.norm.weight]},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_a_cache_that_shares_memory_with_weights_is_refused(cache, twins):
    def leak(block, x):
        KEPT.append(cache(block))
        return x

    _, folder = twins(toys.Stack)
    try:
        with (
            streamed(lambda: Leaky(leak), folder, policy="none") as m,
            pytest.raises(AliasError, match=r"'blocks.0': a cache"),
        ):
            m(noise())
    finally:
        KEPT.clear()


def test_a_graph_that_holds_weights_is_refused(twins):
    def leak(block, x):
        with torch.enable_grad():
            scale = torch.ones(D, requires_grad=True)
            KEPT.append((block.down.bias * scale).sum())
        return x

    _, folder = twins(toys.Stack)
    try:
        with streamed(lambda: Leaky(leak), folder, policy="none") as m, pytest.raises(AliasError):
            m(noise())
    finally:
        KEPT.clear()


def test_cycles_that_forward_leaves_behind_are_no_alias(twins):
    def leak(block, x):
        cycle = Holder(block.up.weight)
        cycle.me = cycle
        return x

    resident, folder = twins(toys.Stack)
    gc.disable()
    try:
        with streamed(lambda: Leaky(leak), folder, policy="none") as m, torch.no_grad():
            assert_same(m(noise()), resident(noise()))
    finally:
        gc.enable()


def test_copies_of_weights_may_be_kept(twins):
    def leak(block, x):
        KEPT.append((block.up.weight.clone(), block.up.weight.sum(), block.up.weight.dtype))
        return x

    resident, folder = twins(toys.Stack)
    try:
        with streamed(lambda: Leaky(leak), folder, policy="none") as m, torch.no_grad():
            assert_same(m(noise()), resident(noise()))
        assert torch.equal(KEPT[0][0], resident.blocks[0].up.weight)
    finally:
        KEPT.clear()


def test_a_result_that_shares_memory_with_resident_weights_is_refused(twins):
    class Returns(toys.Stack):
        def forward(self, x):
            return {"x": super().forward(x), "scale": self.norm.weight[:4]}

    _, folder = twins(toys.Stack)
    with (
        streamed(Returns, folder) as m,
        pytest.raises(AliasError, match=r"output\['scale'\] of Returns shares memory"),
    ):
        m(noise())


def test_a_module_that_keeps_a_resident_weight_is_refused(twins):
    class Keeps(toys.Stack):
        def forward(self, x):
            self.__dict__["kept"] = self.norm.weight.float()  # itself: it is float32
            return super().forward(x)

    _, folder = twins(toys.Stack)
    with streamed(Keeps, folder) as m:
        with pytest.raises(AliasError, match=r"'Keeps': a cache.*segment 'rest'"):
            m(noise())
        del m.kept


def test_results_of_any_shape_are_looked_through():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    ring: list[object] = [b]
    ring.append(ring)
    deep = Holder({"list": ring, "twice": (a, a)})
    deep.me = deep
    deep.fine = Holder(Holder(Holder(c)))
    assert sorted(t.numel() for _, t in tensors_in({"x": deep, 3: None, "text": "abc"})) == [1, 2, 3]
    assert {p for p, t in tensors_in({"x": deep}) if t is b} == {"['x'].value['list'][0]"}


def test_writing_to_a_weight_is_refused(twins):
    def leak(block, x):
        block.up.weight.mul_(2)
        return x

    _, folder = twins(toys.Stack)
    with (
        streamed(lambda: Leaky(leak), folder) as m,
        pytest.raises(ModelError, match=r"'blocks.0' writes to its weights"),
    ):
        m(noise())


def test_inputs_that_require_grad_are_refused(twins):
    _, folder = twins(toys.Stack)
    x = noise().requires_grad_()
    with blockstream.stream(toys.Stack, folder, arena="1MiB") as m:
        with pytest.raises(ModelError, match=r"input of Stack .*requires grad.*no_grad"):
            m(x)
        with pytest.raises(ModelError, match="requires grad"):
            m(x=x)
        with torch.no_grad():
            m(x)
        assert not m(noise()).requires_grad


def test_concurrent_calls_are_refused_and_the_first_goes_on(twins):
    inside, go_on = threading.Event(), threading.Event()

    def leak(block, x):
        inside.set()
        assert go_on.wait(timeout=10)
        return x

    resident, folder = twins(toys.Stack)
    with torch.no_grad():
        want = resident(noise())
    results: list[object] = []

    def call(m):
        with torch.no_grad():
            results.append(m(noise()))

    with streamed(lambda: Leaky(leak), folder, policy="none") as m:
        other = threading.Thread(target=call, args=(m,))
        other.start()
        assert inside.wait(timeout=10)
        with pytest.raises(ModelError, match="another thread computes"):
            m(noise())
        with pytest.raises(ModelError, match="another thread computes"):
            m.blocks[1](noise())
        go_on.set()
        other.join(timeout=10)
        assert_same(results, [want])
        assert_same(m(noise()), want)  # its turn now


def test_a_block_that_calls_another_is_refused_by_name(twins):
    class Nested(toys.Stack):
        def __init__(self):
            super().__init__()
            first, second = self.blocks[0], self.blocks[1]
            run = first.forward
            first.forward = lambda x: run(second(x))

    _, folder = twins(toys.Stack)
    with (
        streamed(Nested, folder, policy="none") as m,
        pytest.raises(ModelError, match=r"'blocks.1' is called while 'blocks.0' computes.*stream_order"),
    ):
        m(noise())


def test_a_stage_called_inside_another_is_refused(twins):
    _, folder = twins(toys.Stack)

    class Calls(toys.Stack):
        inner: nn.Module

        def forward(self, x):
            return self.inner(super().forward(x))

    with torch.no_grad(), blockstream.open(arena="1MiB") as s:
        outer, inner = s.stage("outer", Calls, folder), s.stage("inner", toys.Stack, folder)
        outer.__dict__["inner"] = inner
        with pytest.raises(ModelError, match="'inner' is called inside the forward of another stage"):
            outer(noise())
