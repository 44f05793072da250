"""What users and torch itself do to a module while it streams: the same as resident, or refused whole."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import ModelError
from blockstream.module.standins import Absent
from blockstream.verify.recorder import Recorder
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import streamed
from tests.support.toys import D, noise

ARENAS = ["8KiB", "1MiB"]


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3)


class Padded(nn.Module):
    """Calls torch's encoder, inside another module, with rows that are padded."""

    def __init__(self, make=encoder) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(D, D), make()

    def forward(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 4:] = True
        return self.encoder(self.first(x), src_key_padding_mask=mask)


class Asks(toys.Stack):
    """Looks at its blocks before it calls them, as modules with a fused path do."""

    def forward(self, x):
        weights = [p for b in self.blocks for p in b.parameters()]
        plain = not torch.overrides.has_torch_function(weights)
        plain = plain and not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        plain = plain and all(type(w) in (nn.Parameter, Absent) and w.device.type == "cpu" for w in weights)
        plain = plain and all(w.dtype is x.dtype and not w.is_nested and not w.is_meta for w in weights)
        return super().forward(x if plain else 2 * x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("arena", [None, "1MiB"])
@pytest.mark.parametrize("make", [Padded, Asks, lambda: Padded(lambda: encoder(norm_first=True))])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested")
def test_a_module_that_looks_before_it_computes_takes_the_path_it_takes_resident(make, arena, grad, twins):
    resident, folder = twins(make)
    resident.requires_grad_(True)
    x = noise(3, 6, D)
    with torch.set_grad_enabled(grad):
        want = resident(x).detach()
    with streamed(make, folder, arena=arena) as m, torch.set_grad_enabled(grad):
        for _ in range(4):
            assert_same(m(x), want)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_what_records_the_calls_of_a_module_does_not_change_its_path():
    module = Padded().eval()
    with torch.no_grad():
        want = module(noise(3, 6, D))
        recorder = Recorder()
        recorder.attach("m", module, {f"encoder.layers.{i}": str(i) for i in range(3)})
        assert torch.equal(module(noise(3, 6, D)), want)
    assert (recorder.forwards("m"), recorder.visits("m")) == (1, 3)
    recorder.detach()
    assert not any("_call_impl" in m.__dict__ for m in module.modules())


REFUSED = {
    "half": lambda m: m.half(),
    "half of a part": lambda m: m.blocks.half(),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "to another device": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(True),
    "state_dict": lambda m: m.state_dict(),
    "saved": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "load_state_dict": lambda m: m.load_state_dict(toys.Rotary().state_dict()),
    "load_state_dict of a part": lambda m: m.blocks[0].load_state_dict(toys.Rotary().blocks[0].state_dict()),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_would_change_or_copy_weights_is_refused_by_name_and_changes_nothing(use, arena, twins):
    resident, folder = twins(toys.Rotary)
    x = noise()
    with torch.no_grad():
        want = resident(x)
    with blockstream.empty():
        module = toys.Rotary().eval()
    buffers = {n: b.clone() for n, b in module.named_buffers() if not b.is_meta}
    with streamed(module, folder, arena=None if arena == ARENAS[0] else arena) as m:
        for _ in range(3):
            m(x)
        with pytest.raises(ModelError, match=r"is streamed|is on disk"):
            use(m)
        assert torch.equal(m(x), want)
        assert m.state_dict(keep_vars=True).keys() == resident.state_dict().keys()
    for name, before in buffers.items():
        after = module.get_buffer(name)
        assert after.dtype is before.dtype and torch.equal(after, before)


@pytest.mark.parametrize("arena", ARENAS)
def test_what_changes_nothing_is_allowed(arena, twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena=None if arena == ARENAS[0] else arena) as m, torch.no_grad():
        for use in (
            lambda: m.to("cpu"),
            m.float,
            m.cpu,
            lambda: m.requires_grad_(False),
            m.eval,
            m.zero_grad,
        ):
            use()
            assert_same(m(noise()), resident(noise()))
        with torch.inference_mode():
            assert m.to("cpu", torch.float32) is m
            assert m.blocks[0].up.weight.float() is not None
            assert torch.equal(m(noise()), resident(noise()))


@pytest.mark.parametrize("arena", ARENAS)
def test_parameters_that_the_user_keeps_do_no_harm(arena, twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena=None if arena == ARENAS[0] else arena) as m, torch.no_grad():
        kept = [list(m.parameters())]
        for _ in range(4):
            assert_same(m(noise()), resident(noise()))
            kept.append(list(m.parameters()))


def test_a_parameter_kept_from_memory_becomes_a_stand_in_when_its_memory_goes(twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB") as m, torch.no_grad():
        for _ in range(3):
            m(noise())
        kept = m.blocks[1].up.weight
        assert torch.equal(kept, resident.blocks[1].up.weight)
        blockstream.session(m).set_budget(None)  # calls are followed again
        assert_same(m(noise()), resident(noise()))
        with pytest.raises(ModelError, match=r"parameter 'blocks.1.up.weight' .* is on disk"):
            kept.sum()
        assert_same(m(noise()), resident(noise()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("forwards", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_computes_or_is_refused_by_name(arena, forwards, twins):
    resident, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena=None if arena == ARENAS[0] else arena) as m, torch.no_grad():
        want = resident(noise())
        for _ in range(forwards):
            m(noise())
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the pool of threads is the parent's
                os.write(write, b"equal" if torch.allclose(m(noise()), want, atol=1e-5) else b"differs")
            except BaseException as error:
                os.write(write, repr(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            said = answer.read().decode()
        assert os.waitpid(child, 0)[1] == 0
        assert (said == "equal") if forwards == 0 else ("Stack is called in a forked process" in said)
        assert torch.equal(m(noise()), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_may_leave_the_block(twins):
    _, folder = twins(toys.Stack)
    child = None
    with streamed(toys.Stack, folder, arena="1MiB") as m:
        m(noise())
        child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_module_is_refused_by_name_after_its_block(twins):
    resident, folder = twins(toys.Stack)
    with blockstream.empty():
        module = toys.Stack().eval()
    with streamed(module, folder, arena="1MiB") as m:
        m(noise())
    for call in (module, module.blocks[1]):
        with pytest.raises(ModelError, match=r"Stack\S* was streamed and that has ended"):
            call(noise())
    with streamed(module, folder, arena="1MiB") as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))
    module.load_state_dict(resident.state_dict(), assign=True)
    with torch.no_grad():
        assert_same(module(noise()), resident(noise()))


def test_a_stream_without_with_says_what_to_write(twins):
    _, folder = twins(toys.Stack)
    model = blockstream.stream(toys.Stack, folder, arena="1MiB")
    for use in (lambda: model(noise()), lambda: model.generate, lambda: model.parameters):
        with pytest.raises(ModelError, match=r"write `with blockstream\.stream\(\.\.\.\) as model:`"):
            use()


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("arena", [None, "16MiB"])  # streamed, and all in memory to stay
def test_a_trace_which_would_keep_the_memory_of_weights_is_refused_by_name(twins, arena):
    resident, folder = twins(toys.Stack)
    x = noise()
    with streamed(toys.Stack, folder, arena) as m:
        for _ in range(3):
            m(x)
        with pytest.raises(ModelError, match="Stack is streamed: a trace of it would keep memory"):
            torch.jit.trace(m, x)
        assert_same(m(x), resident(x))


def replaced(m):
    m.blocks[1].up.weight = nn.Parameter(torch.zeros(2 * D, D))
    return m(noise())


def overridden(m):
    return torch.func.functional_call(m, {"blocks.1.up.weight": torch.zeros(2 * D, D)}, (noise(),))


@pytest.mark.parametrize("act", [replaced, overridden])
def test_weights_put_in_the_place_of_streamed_ones_are_refused_by_name_not_passed_over(twins, act):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder) as m:
        m(noise())
        with pytest.raises(ModelError, match=r"up\.weight' of segment 'blocks\.1\S*' was replaced while"):
            act(m)
