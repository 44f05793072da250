"""What real models do beyond running their blocks one after another."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import blockstream
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.errors import ModelError
from blockstream.module.row_tables import TableReader
from blockstream.plan.segments import Unknown
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import least_of, streamed
from tests.support.toys import D, noise

FACTORIES = [
    toys.Stack, toys.Zipped, toys.Declared, toys.Backwards, toys.Twice, toys.SharedInside, toys.Attention,
    toys.Recurrent, toys.Towers, toys.Rotary, toys.Peeks, toys.Outside, toys.Strided,
]  # fmt: skip


@pytest.mark.parametrize("room", [1.0, 1.5, 20.0], ids=["least", "some", "all"])
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_every_shape_of_model_gives_what_it_gives_resident(factory, room, twins):
    resident, folder = twins(factory)
    x = noise()
    with torch.no_grad():
        want = resident(x)
    with streamed(factory, folder, int(room * least_of(factory, folder)), policy="spread") as m:
        for _ in range(4):
            assert_same(m(x), want)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("arena", [None, "1MiB"], ids=["least", "all"])
def test_weights_require_grad_as_resident_ones_do_and_no_graph_is_kept(arena, frozen, twins):
    resident, folder = twins(toys.Strided)
    resident.requires_grad_(not frozen)
    wide = noise(64, 48, toys.D)
    want = resident(wide).detach()
    with streamed(lambda: toys.Strided().requires_grad_(not frozen), folder, arena) as m:
        for is_kept in (False, False, True, True, False):
            with torch.set_grad_enabled(is_kept):
                assert_same(m(wide), want)
                assert not m(wide).requires_grad
                assert torch.is_grad_enabled() is is_kept
        assert any(p.requires_grad for p in m.parameters()) is not frozen


@pytest.mark.parametrize("factory", [toys.Zipped, toys.Backwards, toys.Twice], ids=lambda f: f.__name__)
def test_the_first_pass_corrects_the_order_and_the_second_follows_it(factory, twins):
    _, folder = twins(factory)
    with streamed(factory, folder, policy="none") as m:
        s = blockstream.session(m)
        m(noise())
        learnt = s.unplanned
        assert learnt > 0
        for _ in range(3):
            m(noise())
        assert s.unplanned == learnt


def test_a_declared_order_is_followed_from_the_first_pass_on(twins):
    _, folder = twins(toys.Declared)
    with streamed(toys.Declared, folder) as m:
        s = blockstream.session(m)
        planned = [s.plan.schedule.stages[0].segments[i].name for i in s.plan.schedule.stages[0].order]
        assert planned == toys.ZIPPED
        m(noise())
        assert s.unplanned == 0


@pytest.mark.parametrize("factory", [toys.Zipped, toys.Backwards, toys.Twice], ids=lambda f: f.__name__)
def test_example_inputs_tell_the_order_before_the_first_pass(factory, twins):
    resident, folder = twins(factory)
    with streamed(factory, folder, example_inputs=(noise(),)) as m:
        with torch.no_grad():
            assert_same(m(noise()), resident(noise()))
        assert blockstream.session(m).unplanned == 0


def test_a_declared_module_that_is_not_there_is_refused(twins):
    class Wrong(toys.Zipped):
        def stream_order(self):
            return ["spatial.0", "spatial.7"]

    _, folder = twins(toys.Zipped)
    with (
        pytest.raises(ModelError, match=r"stream_order\(\) names 'spatial.7'"),
        blockstream.stream(Wrong, folder, arena="1MiB"),
    ):
        pass


def test_skipped_blocks_are_passed_over(twins):
    resident, folder = twins(toys.Skips)
    inputs = [noise() + shift for shift in (0.0, 5.0, -5.0, 5.0, -5.0, -5.0, -5.0, 5.0)]
    with torch.no_grad():
        wants = [resident(x) for x in inputs]
    assert len({int(x.mean() > 0) for x in inputs}) == 2
    with streamed(toys.Skips, folder, policy="prefix") as m:
        for x, want in zip(inputs, wants, strict=True):
            assert_same(m(x), want)


def test_an_order_that_never_settles_is_said_once(twins, caplog):
    class Shuffled(toys.Stack):
        calls = 0

        def forward(self, x):
            Shuffled.calls += 1
            blocks = list(self.blocks)
            for i in range(len(blocks)):
                x = blocks[(i * Shuffled.calls) % len(blocks)](x)
            return x

    def factory():
        return Shuffled(7)

    resident, folder = twins(factory)
    with streamed(factory, folder) as m, caplog.at_level(logging.WARNING, "blockstream"), torch.no_grad():
        for call in range(5):
            Shuffled.calls = call
            want = resident(noise())
            Shuffled.calls = call
            assert_same(m(noise()), want)
    said = [r for r in caplog.records if "another order in every pass" in r.message]
    assert len(said) == 1


def test_tied_weights_stay_tied(twins):
    resident, folder = twins(toys.Tied)
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    with torch.no_grad():
        want = resident(ids)
    with blockstream.empty():
        module = toys.Tied().eval()
    with streamed(module, folder, arena="1MiB") as m:
        assert_same(m(ids), want)
        assert m.head.weight is m.embed.weight
        assert m.blocks[0].up.weight is m.blocks[2].up.weight
    assert module.head.weight is module.embed.weight
    assert module.blocks[0].up.weight is module.blocks[2].up.weight


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_large_table_is_gathered_by_row_and_its_tied_head_loaded(dtype, twins, monkeypatch):
    monkeypatch.setattr("blockstream.module.partition.GATHER_NBYTES", 1000)
    monkeypatch.setattr("blockstream.module.partition.RESIDENT_NBYTES", 0)
    resident, folder = twins(toys.Tied)
    if dtype:
        resident.to(torch.bfloat16)
    ids = torch.tensor([[3, 1, 4], [1, 5, 49], [0, 0, 3]])
    every = torch.arange(50)[None]  # more rows than threads
    with torch.no_grad():
        want, want_every = resident(ids), resident(every)
    with streamed(toys.Tied, folder, arena="1MiB", dtype=dtype) as m:
        assert_same(m(every), want_every)
        for _ in range(2):
            assert_same(m(ids), want)
        report = blockstream.session(m).report()
        assert report["stages"][0]["gathered_nbytes"] > 0
        assert "embed" not in str(m.head.weight)
        with pytest.raises(IndexError, match="table of 50 rows"):
            m(torch.tensor([[50]]))
        with pytest.raises(ModelError, match=r"table 'embed.weight'"):
            m.embed.weight.sum()
        assert_same(m(ids), want)


def test_rows_used_last_are_kept_and_not_read_again(tmp_path, monkeypatch):
    made = synthesise({"t": ("F32", (40, 8))}, tmp_path / "c")
    table = load_file(made.root / "model.safetensors")["t"]
    reader = TableReader(made.entries["t"], "F32")
    monkeypatch.setattr("blockstream.module.row_tables.KEEP_NBYTES", 4 * 8 * 4)

    def read(*ids):
        before = reader.read_nbytes
        assert torch.equal(reader.gather(torch.tensor(ids)), table[list(ids)])
        return reader.read_nbytes > before

    try:
        assert read(3, 1, 4, 1)
        assert not read(4, 3)
        assert read(1, 7, 9), "1 is at hand, the others are read"
        assert not read(1, 9, 7, 4)
        assert read(3), "it made room"
        assert read(*range(40))
    finally:
        reader.close()


def test_what_lies_outside_the_blocks_is_streamed_when_large(twins, monkeypatch):
    monkeypatch.setattr("blockstream.module.partition.RESIDENT_NBYTES", 0)
    resident, folder = twins(toys.Outside)
    with torch.no_grad():
        want = resident(noise())
    with streamed(toys.Outside, folder) as m:
        names = {x.name for x in blockstream.session(m).plan.schedule.stages[0].segments if not x.resident}
        assert names == {"wide", "narrow", "blocks.0", "blocks.1", "head"}
        for _ in range(3):
            assert_same(m(noise()), want)


def test_a_module_without_blocks_is_streamed_layer_by_layer(twins, monkeypatch):
    monkeypatch.setattr("blockstream.module.partition.RESIDENT_NBYTES", 1000)
    resident, folder = twins(toys.Plain)
    with torch.no_grad():
        want = resident(noise(2, D))
    with streamed(toys.Plain, folder) as m:
        assert {"a", "c"} <= {x.name for x in blockstream.session(m).plan.schedule.stages[0].segments}
        assert_same(m(noise(2, D)), want)


def wide() -> nn.Module:
    return toys.Stack(4, 64)


def test_blocks_too_large_for_the_arena_are_cut_finer(twins):
    resident, folder = twins(wide)
    whole = least_of(wide, folder)
    with torch.no_grad():
        want = resident(noise(3, 64))
    with streamed(wide, folder, arena=int(0.7 * whole)) as m:
        for _ in range(3):
            assert_same(m(noise(3, 64)), want)
        names = [x.name for x in blockstream.session(m).plan.schedule.stages[0].segments]
        assert "blocks.0.up" in names
        assert "blocks.0" not in names


def test_a_block_called_by_itself_first_may_be_cut_finer(twins):
    resident, folder = twins(wide)
    whole = least_of(wide, folder)
    with streamed(wide, folder, arena=int(0.7 * whole)) as m, torch.no_grad():
        assert_same(m.blocks[0](noise(3, 64)), resident.blocks[0](noise(3, 64)))
        assert_same(m(noise(3, 64)), resident(noise(3, 64)))


def test_methods_besides_forward_stream_too(twins):
    resident, folder = twins(toys.Codec)
    with torch.no_grad():
        want = [resident.decode(resident.encode(noise())) for _ in range(1)]
    with streamed(toys.Codec, folder, policy="none", passes=Unknown(4)) as m:
        for _ in range(3):
            assert_same(m.decode(m.encode(noise())), want)
        for _ in range(4):
            m.decode(noise())
        assert blockstream.session(m).plan.schedule.stages[0].order[-1] is not None


def test_a_part_of_the_module_may_be_called_alone(twins):
    resident, folder = twins(toys.Towers)
    with torch.no_grad():
        middle, want = resident.encoder(noise()), resident(noise())
    with streamed(toys.Towers, folder) as m:
        assert_same(m.encoder(noise()), middle)
        assert_same(m(noise()), want)
        assert_same(m.encoder(noise()), middle)
        assert_same(m.encoder.norm(noise()), resident.encoder.norm(noise()))


def test_weights_of_what_is_resident_may_be_used_anywhere_in_the_forward(twins):
    resident, folder = twins(toys.Peeks)
    with torch.no_grad():
        want = resident(noise())
    with streamed(toys.Peeks, folder) as m:
        assert_same(m(noise()), want)


def test_weights_of_a_block_that_is_not_running_are_refused_by_name(twins):
    _, folder = twins(toys.Stack)
    refused = pytest.raises(ModelError, match=r"'blocks.1.up.weight' of segment 'blocks.1' is on disk")
    with streamed(toys.Steals, folder, policy="none") as m, refused:
        m(noise())


def test_buffers_keep_their_values_and_stored_ones_are_loaded(twins):
    resident, folder = twins(toys.Rotary)
    torch.manual_seed(5)
    with blockstream.empty():
        module = toys.Rotary().eval()
    before = module.shift.clone()
    with streamed(module, folder, arena="1MiB") as m, torch.no_grad():
        assert torch.equal(m.shift, resident.shift)
        assert_same(m(noise()), resident(noise()))
    assert torch.equal(module.shift, before)


def test_a_lost_buffer_is_rebuilt_from_the_config(twins):
    class Configured(toys.Rotary):
        pass

    resident, folder = twins(toys.Rotary)
    with torch.device("meta"):
        module = Configured(config={"config": "same"}).eval()
    assert module.frequencies.is_meta
    with streamed(module, folder, arena="1MiB") as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))


def test_a_lost_buffer_without_a_config_is_refused_by_name(twins):
    _, folder = twins(toys.Rotary)
    with torch.device("meta"):
        module = toys.Rotary().eval()
    with (
        pytest.raises(ModelError, match=r"buffer 'frequencies' .*blockstream.empty\(\)"),
        blockstream.stream(module, folder, arena="1MiB"),
    ):
        pass


def test_a_module_without_parameters_is_refused(twins):
    _, folder = twins(toys.Stack)
    with (
        pytest.raises(ModelError, match="nothing to stream"),
        blockstream.stream(nn.ReLU(), folder, arena="1MiB"),
    ):
        pass
