"""Resident weights read another way, and the check of every visit, over models of every kind."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import ModelError
from blockstream.module.empty import empty
from blockstream.streaming.session import Session
from blockstream.verify.difference import DifferenceError
from blockstream.verify.recorder import Recorder, digest, most_apart, same
from blockstream.verify.sessions import CheckedSession, ResidentSession
from tests.support.models import CASES, aligned, assert_same, save


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """Return (checkpoint, result of the resident module) of a case, made once."""
    made: dict[str, tuple] = {}

    def get(case):
        if case.name not in made:
            torch.manual_seed(0)
            module = case.make()
            folder = save(module, tmp_path_factory.mktemp(case.name))
            with torch.no_grad():
                made[case.name] = folder, case.run(aligned(module))
        return made[case.name]

    return get


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_read_another_way_give_what_the_library_gives(case, resident):
    folder, want = resident(case)
    with empty():
        module = case.make().eval()
    with torch.no_grad(), ResidentSession(segments={"m": {}}) as s:
        m = s.stage("m", module, folder)
        s.start()
        assert_same(case.run(m), want)
        assert all(p.data_ptr() % 64 == 0 for p in m.parameters())
        s.end("m")
        assert_same(case.run(m), want)  # and read again when it is called again
    assert all(p.is_meta for p in module.parameters())
    assert not any(x._forward_pre_hooks or x._forward_hooks for x in module.modules())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_visit_of_a_streamed_model_passes_the_check(case, resident):
    folder, want = resident(case)
    with torch.no_grad(), CheckedSession(arena="2MiB", policy="none", by_segment=True) as s:
        m = s.stage("m", case.make, folder)
        s.start()
        assert_same(case.run(m), want)
        check = s.checks["m"]
        assert set(check.visits) == {p.name for p in s.prepared["m"].parts if not p.resident}
        assert not check.weights_alone


def test_blocks_cut_finer_are_checked_piece_by_piece(resident):
    case = next(c for c in CASES if c.name == "llama-generate-3")
    folder, want = resident(case)
    with blockstream.Session() as s:
        s.stage("m", case.make, folder)
        finest = s.finest_arena_nbytes
    with torch.no_grad(), CheckedSession(arena=finest, policy="none", by_segment=True) as s:
        m = s.stage("m", case.make, folder)
        s.start()
        assert_same(case.run(m), want)
        assert {"model.layers.0.mlp.up_proj", "model.layers.4.self_attn.o_proj"} <= set(s.checks["m"].visits)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_converted_weights_pass_the_check_from_either_kind_of_file(dtype, form, tmp_path: Path):
    case = CASES[0]
    torch.manual_seed(0)
    module = case.make()
    folder = tmp_path / "w"
    if form == "bin":
        folder.mkdir()
        torch.save(module.state_dict(), folder / "pytorch_model.bin")
    else:
        save(module, folder)
    results = []
    for kind, options in ((CheckedSession, {"by_segment": True}), (ResidentSession, {"segments": {"m": {}}})):
        with torch.no_grad(), kind(arena="2MiB", **options) as s:
            m = s.stage("m", case.make, folder, dtype=dtype)
            s.start()
            results.append(case.run(m))
    assert_same(*results)


class Looking(nn.Module):
    """Computes otherwise where it finds a hook, as torch's encoder layers do, or weights that are none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        hooked = any(m._forward_pre_hooks or m._forward_hooks for m in self.modules())
        plain = all(type(p) is nn.Parameter for p in self.blocks[0].parameters())
        for block in self.blocks:
            x = block(x) * (1.0 if plain and not hooked else 2.0)
        return x


def test_a_module_that_looks_at_its_hooks_finds_none_on_the_resident_side(tmp_path):
    module = Looking().eval()
    folder, x = save(module, tmp_path / "w"), torch.randn(2, 16)
    with torch.no_grad(), ResidentSession(segments={"m": {"blocks.1": "blocks.1"}}) as s:
        m = s.stage("m", Looking, folder)
        s.start()
        assert_same(m(x), aligned(module)(x))
    with pytest.raises(ModelError, match="was streamed and that has ended"):
        m(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(16, 16) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return x


def test_recurrent_layers_which_keep_lists_of_their_weights_pass_the_check(tmp_path):
    torch.manual_seed(0)
    folder, x = save(Recurrent(), tmp_path / "w"), torch.ones(3, 2, 16)
    with torch.no_grad(), CheckedSession(arena="1MiB", by_segment=True) as s:
        m = s.stage("m", Recurrent, folder)
        s.start()
        want = m(x)
    with torch.no_grad(), ResidentSession(segments={"m": {}}) as s:
        m = s.stage("m", Recurrent, folder)
        s.start()
        assert torch.equal(m(x), want)


class Chain(nn.Module):
    layer: type[nn.Linear] = nn.Linear

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.layer(16, 16) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Noisy(Chain):
    class layer(nn.Linear):  # noqa: N801
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x)


def test_blocks_that_draw_random_numbers_are_run_again_with_the_same_and_the_run_goes_on_with_its_own(
    tmp_path,
):
    torch.manual_seed(0)
    folder, x = save(Noisy(), tmp_path / "w"), torch.ones(2, 16)
    results = []
    for by_segment in (True, frozenset()):
        torch.manual_seed(5)
        with torch.no_grad(), CheckedSession(arena="1MiB", by_segment=by_segment) as s:
            m = s.stage("m", Noisy, folder)
            s.start()
            results.append(m(x))
    assert torch.equal(*results)


class Forgetful(Chain):
    """Its blocks give something else when they are run again."""

    class layer(nn.Linear):  # noqa: N801
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls


def test_a_block_whose_results_differ_is_named_with_how_far_apart_they_are(tmp_path):
    torch.manual_seed(0)
    folder = save(Forgetful(), tmp_path / "w")
    with torch.no_grad(), CheckedSession(arena="1MiB", by_segment=True) as s:
        m = s.stage("m", Forgetful, folder)
        s.start()
        with pytest.raises(DifferenceError, match=r"segment 'layers.0', call 1: output differs by at most 1"):
            m(torch.ones(2, 16))


def test_a_resident_module_before_its_first_call_refuses_its_weights_by_name(tmp_path):
    folder = save(Recurrent(), tmp_path / "w")
    with ResidentSession(segments={"m": {}}) as s:
        m = s.stage("m", Recurrent, folder)
        assert next(m.parameters()).device == torch.device("cpu")
        assert blockstream.session(m) is s
        with pytest.raises(ModelError, match=r"layers\.0\.weight_ih_l0"):
            m.layers[0].weight_ih_l0 + 1
    with pytest.raises(ModelError, match="is not being streamed"):
        blockstream.session(m)


def test_one_resident_stage_is_in_memory_at_a_time(tmp_path):
    folder, x = save(Recurrent(), tmp_path / "w"), torch.ones(3, 2, 16)
    with torch.no_grad(), ResidentSession(segments={"a": {}, "b": {}}) as s:
        a, b = (s.stage(name, Recurrent, folder) for name in "ab")
        s.start()
        first = a(x)
        assert torch.equal(b(x), first)
        assert not s._residents["a"]._is_loaded and s._residents["b"]._is_loaded
        assert torch.equal(a(x), first)


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0.0),
        ([float("nan")], [float("nan")], 0.0),
        ([1.0], [1.0, 2.0], None),
    ],
)
def test_how_far_tensors_are_apart(a, b, apart):
    assert most_apart(torch.tensor(a), torch.tensor(b)) == apart


def test_zeros_of_either_sign_and_other_dtypes_are_not_the_same():
    zero = torch.zeros(2)
    assert same(zero, torch.zeros(2)) and not same(zero, -zero) and not same(zero, zero.int())
    assert digest(zero) != digest(-zero) and digest([zero]) != digest({"x": zero})
    assert digest(torch.arange(6).view(2, 3).t()) == digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_records_count_the_calls_of_each_segment_and_of_the_module():
    net, seen = Chain(), []
    recorder = Recorder(lambda index, record, output: seen.append((index, record.segment, record.call)))
    recorder.attach("m", net, {"layers.0": "first"})
    for _ in range(2):
        net(torch.ones(1, 16))
    recorder.detach()
    net(torch.ones(1, 16))
    assert seen == [(0, "first", 1), (1, None, 1), (2, "first", 2), (3, None, 2)]
    assert (recorder.forwards("m"), recorder.visits("m")) == (2, 2)


def test_a_resident_stage_takes_whatever_a_streamed_one_takes(tmp_path):
    given = signature(Session.stage).parameters.values()
    options = {p.name: p.default for p in given if p.default is not p.empty and p.name != "checkpoint"}
    folder = save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "w")
    with ResidentSession(segments={"one": {}}) as session:
        assert session.stage("one", lambda: nn.Sequential(nn.Linear(4, 4)), folder, **options)
