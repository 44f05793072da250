"""The module is the user's: hooks run inside ours, and leaving puts everything back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import EngineError, ModelError
from blockstream.module.guards import CALL
from blockstream.module.standins import Absent
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import streamed
from tests.support.toys import noise


def state_of(module: nn.Module):
    """Return everything about a module that streaming could change."""
    return {
        path: (
            dict(m._parameters),
            {n: (b, None if b is None or b.is_meta else b.clone()) for n, b in m._buffers.items()},
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
            list(m._forward_hooks_always_called),
            list(m._forward_pre_hooks_with_kwargs),
            sorted(m.__dict__.keys() - {CALL}),  # what refuses the calls of an ended session
        )
        for path, m in module.named_modules()
    }


def assert_unchanged(module: nn.Module, before) -> None:
    after = state_of(module)
    assert before.keys() == after.keys()
    for path, (params, buffers, *rest) in before.items():
        assert all(after[path][0][n] is p for n, p in params.items())
        for name, (buffer, value) in buffers.items():
            assert after[path][1][name][0] is buffer
            assert value is None or torch.equal(buffer, value)
        assert after[path][2:] == tuple(rest)


def empty(factory):
    with blockstream.empty():
        return factory().eval()


@pytest.mark.parametrize(
    "factory", [toys.Stack, toys.Tied, toys.Rotary, toys.Recurrent], ids=lambda f: f.__name__
)
def test_leaving_restores_the_module_exactly(factory, twins):
    _, folder = twins(factory)
    module = empty(factory)
    before = state_of(module)
    x = torch.tensor([[1, 2]]) if factory is toys.Tied else noise()
    with streamed(module, folder, arena="1MiB") as m:
        m(x)
        m(x)
    assert_unchanged(module, before)


def test_an_exception_in_a_block_leaves_the_module_usable_and_restores_it(twins):
    resident, folder = twins(toys.Stack)
    module = empty(toys.Stack)
    before = state_of(module)
    with torch.no_grad():
        want = resident(noise())
    with streamed(module, folder, arena="1MiB", policy="none") as m:
        assert_same(m(noise()), want)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shape"):
                m(noise(2, 7))
        with pytest.raises(RuntimeError), torch.no_grad():
            m.blocks[2](noise(2, 7))
        assert isinstance(m.blocks[2].up.weight, Absent)
        assert_same(m(noise()), want)
    assert_unchanged(module, before)


@pytest.mark.parametrize("where", ["", "blocks.1", "norm"])
def test_an_interrupt_leaves_the_module_usable_and_restores_it(where, twins):
    resident, folder = twins(toys.Stack)
    module = empty(toys.Stack)
    before = state_of(module)
    with torch.no_grad():
        want = resident(noise())
    with streamed(module, folder, arena="1MiB", policy="none") as m:

        def interrupt(*_):
            raise KeyboardInterrupt

        for _ in range(2):
            hook = m.get_submodule(where).register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                m(noise())
            hook.remove()
            assert_same(m(noise()), want)
    assert_unchanged(module, before)


def test_an_exception_out_of_the_block_restores_the_module(twins):
    _, folder = twins(toys.Stack)
    module = empty(toys.Stack)
    before = state_of(module)
    with pytest.raises(KeyError), streamed(module, folder, arena="1MiB") as m:
        m(noise())
        raise KeyError("the user's")
    assert_unchanged(module, before)


def test_a_failure_to_begin_restores_the_module(twins):
    _, folder = twins(toys.Stack)
    module = empty(toys.Stack)
    before = state_of(module)
    with (
        pytest.raises(blockstream.errors.BudgetError, match="the least is"),
        streamed(module, folder, arena=4096) as m,
    ):
        m(noise())
    assert_unchanged(module, before)


def test_user_hooks_run_while_the_weights_are_there(twins):
    resident, folder = twins(toys.Stack)
    seen = []

    def before(module, args):
        seen.append(("pre", float(module.up.weight.sum())))

    def after(module, args, output):
        seen.append(("post", float(module.up.weight.sum())))
        return output * 1

    module = empty(toys.Stack)
    module.blocks[1].register_forward_pre_hook(before)
    module.blocks[1].register_forward_hook(after)
    with torch.no_grad():
        want = resident(noise())
        total = float(resident.blocks[1].up.weight.sum())
    with streamed(module, folder, arena="1MiB", policy="none") as m:
        late = [m.blocks[1].register_forward_hook(after), m.blocks[1].register_forward_pre_hook(before)]
        assert_same(m(noise()), want)
        for handle in late:
            handle.remove()
        assert_same(m(noise()), want)
    assert seen == [("pre", total)] * 2 + [("post", total)] * 2 + [("pre", total), ("post", total)]


def test_a_hook_that_replaces_inputs_is_obeyed(twins):
    resident, folder = twins(toys.Stack)

    def double(module, args, kwargs):
        return (args[0] * 2,), kwargs

    module = empty(toys.Stack)
    for one in (resident, module):
        one.blocks[0].register_forward_pre_hook(double, with_kwargs=True)
    with streamed(module, folder, arena="1MiB") as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))


def test_weights_say_where_and_what_they_are_while_on_disk(twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB", dtype="bfloat16") as m:
        weight = m.blocks[2].up.weight
        assert weight.device == torch.device("cpu")
        assert weight.dtype is torch.bfloat16
        assert weight.shape == (32, 16)
        assert (weight.dim(), weight.numel(), weight.nbytes, len(weight)) == (2, 512, 1024, 32)
        assert weight.is_floating_point()
        assert weight.requires_grad
        assert isinstance(weight, nn.Parameter)
        assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in toys.Stack().parameters())
        m.requires_grad_(False).eval()
        assert not weight.requires_grad
        assert "on disk" not in repr(m)


def test_asking_weights_to_be_what_they_are_changes_nothing(twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB", policy="none") as m, torch.no_grad():
        assert m.to("cpu") is m
        assert m.to(torch.float32).cpu().float().eval() is m
        assert m.to(device="cpu", dtype=torch.float32, non_blocking=True) is m
        assert_same(m(noise()), resident(noise()))
        m.to("cpu")
        assert_same(m(noise()), resident(noise()))


USES = {
    "another dtype": lambda m: m.to(torch.bfloat16),
    "another device": lambda m: m.to("meta"),
    "a copy": lambda m: m.blocks[0].up.weight.to("cpu", copy=True),
    "arithmetic": lambda m: m.blocks[2].up.weight + 1,
    "indexing": lambda m: m.blocks[2].up.weight[0],
    "state_dict": lambda m: m.state_dict(),
    "half": lambda m: m.half(),
    "deepcopy": lambda m: __import__("copy").deepcopy(m.blocks),
    "pickle": lambda m: __import__("pickle").dumps(m.blocks[0].up.weight),
    "a kernel": lambda m: nn.functional.linear(noise(), m.blocks[2].up.weight),
    "numpy": lambda m: m.blocks[2].up.weight.numpy(),
    "tolist": lambda m: m.blocks[2].up.weight.tolist(),
    "comparison": lambda m: m.blocks[2].up.weight == 1,
    "data": lambda m: m.blocks[2].up.weight.data,
    "requires_grad_": lambda m: m.requires_grad_(True),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_using_a_weight_that_is_on_disk_is_refused_by_name(use, twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB", policy="none") as m:
        named = r"parameter '\S+' of segment '\S+' is on disk|Stack is streamed: its"
        with pytest.raises(ModelError, match=named):
            use(m)
        with torch.no_grad():
            assert_same(m(noise()), resident(noise()))


CHANGES = {
    "was written to": lambda m: m.blocks[1].up.weight.mul_(2),
    "was replaced": lambda m: setattr(m.blocks[1].up, "weight", nn.Parameter(torch.zeros(32, 16))),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_change_of_weights_while_all_are_in_memory_is_not_lost_in_silence(said, twins):
    resident, folder = twins(toys.Stack)
    with torch.no_grad():
        want = resident(noise())
    with streamed(toys.Stack, folder, arena="1MiB") as m:
        assert_same([m(noise()) for _ in range(3)][-1], want)
        CHANGES[said](m)
        assert not torch.equal(m(noise()), want)  # as of any module
        with torch.enable_grad(), pytest.raises(ModelError, match=f"{said} while all its weights were in"):
            m(noise())  # which is followed
        assert torch.equal(m(noise()), want) is (said == "was replaced")  # the other is still in memory


def test_what_is_entered_is_entered_once(twins):
    _, folder = twins(toys.Stack)
    opened = blockstream.stream(toys.Stack, folder, arena="1MiB")
    with opened, pytest.raises(ModelError, match="was entered before; call it again"):
        opened.__enter__()
    with pytest.raises(ModelError, match="was entered before"):
        opened.__enter__()


def test_a_module_is_streamed_once_at_a_time(twins):
    _, folder = twins(toys.Stack)
    module = empty(toys.Stack)
    with streamed(module, folder, arena="1MiB") as m:
        refused = pytest.raises(ModelError, match="already being streamed")
        with refused, blockstream.stream(module, folder, arena="1MiB"):
            pass
        assert blockstream.session(m) is not None
    with pytest.raises(ModelError, match="is not being streamed"):
        blockstream.session(module)
    with streamed(module, folder, arena="1MiB") as m:
        m(noise())


def test_real_parameters_are_set_aside_and_come_back(twins):
    resident, folder = twins(toys.Stack)
    module = toys.Stack().eval()
    before = state_of(module)
    with streamed(module, folder, arena="1MiB") as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))
    assert_unchanged(module, before)


def test_the_module_runs_no_more_once_the_session_is_closed(twins):
    _, folder = twins(toys.Stack)
    s = blockstream.open(arena="1MiB")
    m = s.stage("m", toys.Stack, folder)
    s.close()
    s.close()
    with pytest.raises(EngineError, match="closed"):
        s.stage("n", toys.Stack, folder)
    with pytest.raises(EngineError, match="closed"):
        s.start()
    assert all(p.is_meta for p in m.parameters())
