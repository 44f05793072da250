"""Sessions: stages of one schedule, one budget a process, what they say of themselves."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockstream
from blockstream.engine.ledger import Ledger
from blockstream.errors import BlockstreamError, BudgetError, ConfigError, EngineError, ModelError
from blockstream.plan.segments import AtMost
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import least_of, streamed
from tests.support.toys import noise


def test_stages_run_in_declared_order_under_one_arena(twins):
    first, one = twins(toys.Stack)
    second, two = twins(toys.Zipped)
    arena = max(least_of(toys.Stack, one), least_of(toys.Zipped, two))
    with torch.no_grad(), blockstream.open(arena=arena) as s:
        a = s.stage("a", toys.Stack, one)
        b = s.stage("b", toys.Zipped, two, passes=AtMost(30))
        assert_same(a(noise()), first(noise()))
        for _ in range(5):
            assert_same(b(noise()), second(noise()))
        s.end("b")
        assert [x.name for x in s.plan.schedule.stages] == ["a", "b"]
        assert s.plan.arena_nbytes <= arena
        report = s.report()
        assert [x["name"] for x in report["stages"]] == ["a", "b"]
        assert [x["passes"] for x in report["stages"]] == [1, 5]
        assert blockstream.session(a) is s
        assert blockstream.session(b) is s


def test_a_stage_is_declared_before_the_first_runs(twins):
    _, folder = twins(toys.Stack)
    with torch.no_grad(), blockstream.open(arena="1MiB") as s:
        a = s.stage("a", toys.Stack, folder)
        with pytest.raises(ConfigError, match="a stage 'a' already"):
            s.stage("a", toys.Stack, folder)
        a(noise())
        with pytest.raises(EngineError, match="declare every stage first"):
            s.stage("b", toys.Stack, folder)
        with pytest.raises(ConfigError, match=r"no stage 'z'.*\['a'\]"):
            s.end("z")


def test_a_session_without_stages_says_so():
    with blockstream.open(arena="1MiB") as s, pytest.raises(EngineError, match="no stages"):
        s.start()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="write auto, none, prefix"):
        blockstream.open(arena="1MiB", policy="lru")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"policy": 3}, "policy 3: write the name of one"),
        ({"policy": []}, "policy []: write the name of one"),
        ({"dtype": 3}, "dtype 3: write float32"),
        ({"device": 3}, "3 is no device; write auto"),
        ({"checkpoint": 3}, "3 is no path"),
        ({"checkpoint": {"a": 1}}, "{'a': 1} is no path"),
        ({"checkpoint": b"x"}, "b'x' is no path"),
        ({"checkpoint": ""}, "'' is no path"),
        ({"model": 3}, "int is no model: pass a module"),
    ],
    ids=str,
)
def test_what_is_of_another_kind_is_refused_by_name(named, said, twins):
    _, folder = twins(toys.Stack)
    given = {"model": toys.Stack, "checkpoint": folder, "arena": "1MiB", **named}
    with pytest.raises(BlockstreamError) as found, blockstream.stream(**given):
        pass
    assert said in str(found.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_module_is_refused_by_name(twins):
    _, folder = twins(toys.Stack)
    with (
        pytest.raises(ModelError, match="scripted"),
        blockstream.stream(torch.jit.script(nn.Linear(2, 2)), folder, arena="1MiB"),
    ):
        pass


def test_a_torch_device_is_a_device(twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, device=torch.device("cpu")) as m:
        assert m(noise()).device.type == "cpu"


def test_a_session_that_was_refused_is_not_open():
    for budget in ("3 parsecs", "2GiB", "3GiB"):  # one budget a process: nobody has either of these
        refused = None
        try:
            blockstream.open(budget=budget).close()
        except ConfigError as error:
            refused = error  # whose frames hold the session
        assert (refused is not None) == (budget == "3 parsecs")


def test_nothing_is_read_before_the_first_forward(watched, twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB") as m:
        assert watched.loads == []
        m(noise())
        assert watched.loads[0] == ("model", "rest")


def test_start_reads_before_the_first_forward(watched, twins):
    _, folder = twins(toys.Stack)
    with blockstream.open(arena="1MiB") as s:
        s.stage("m", toys.Stack, folder)
        s.start()
        s.start()
        watched.expect("m", "blocks.1", 1)


def test_two_sessions_with_arenas_run_side_by_side(twins):
    first, one = twins(toys.Stack)
    second, two = twins(toys.Zipped)
    with (
        streamed(toys.Stack, one, arena="1MiB") as a,
        streamed(toys.Zipped, two, arena="2MiB") as b,
        torch.no_grad(),
    ):
        for _ in range(2):
            assert_same(a(noise()), first(noise()))
            assert_same(b(noise()), second(noise()))


def test_another_budget_in_the_same_process_is_refused_and_none_joins():
    with blockstream.open(budget="3GiB"):
        with pytest.raises(BudgetError, match=r"'3GiB' is open.*'2GiB'"):
            blockstream.open(budget="2GiB")
        blockstream.open().close()
        blockstream.open(budget="3GiB").close()
        blockstream.open(budget="2GiB", arena="1MiB").close()
    blockstream.open(budget="2GiB").close()


def test_a_module_goes_with_its_session(twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, arena="1MiB") as m:
        m(noise())
        gone = weakref.ref(m)
        arena = weakref.ref(blockstream.session(m)._tier.arena)
    del m
    gc.collect()
    assert gone() is None
    assert arena() is None


def test_a_segment_is_bound_to_its_place_without_new_tensors(twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, policy="none") as m:
        seen: dict[int, object] = {}
        m.blocks[1].register_forward_pre_hook(
            lambda block, args: seen.setdefault(id(block.up.weight), block.up.weight.data_ptr()) and None
        )
        for _ in range(8):
            m(noise())
        assert len(seen) <= 2  # one a slot
        assert all(address % 64 == 0 for address in seen.values())


def count_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_the_hot_loop_keeps_nothing_however_many_its_passes(twins):
    _, folder = twins(toys.Stack)
    x, ledger = noise(), Ledger(most_spans=256, most_notes=1)
    arena, passes = least_of(toys.Stack, folder), 600
    with torch.no_grad(), blockstream.Session(arena=arena, policy="none", ledger=ledger) as s:
        m = s.stage("m", toys.Stack, folder, passes)
        tracemalloc.start()
        try:
            while ledger.spans.dropped < 256:  # until the record is as long as it may be
                m(x)
            gc.collect()
            before, dropped = tracemalloc.get_traced_memory()[0], ledger.spans.dropped
            tensors = count_tensors()
            for _ in range(150):
                m(x)
            gc.collect()
            after = tracemalloc.get_traced_memory()[0]
            assert count_tensors() <= tensors
            assert ledger.spans.dropped - dropped > 750
            assert after - before < 32 << 10  # the record itself goes up and down by 5 KiB
        finally:
            tracemalloc.stop()
        assert s.report()["arena"]["touched_nbytes"] <= s.plan.arena_nbytes


@pytest.mark.parametrize("shift", range(0, 64, 8))
def test_data_at_any_offset_of_a_file_is_bound_aligned_and_gives_the_same(shift, twins):
    resident, folder = twins(toys.Stack)
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"pad": "x" * (64 + shift)})
    addresses = []
    with streamed(toys.Stack, folder, policy="spread") as m, torch.no_grad():
        for block in m.blocks:
            block.register_forward_pre_hook(
                lambda b, _: addresses.extend(p.data_ptr() % 64 for p in b.parameters())
            )
        for _ in range(2):
            assert_same(m(noise()), resident(noise()))
    assert set(addresses) == {0}


def test_measured_costs_replace_guesses_after_the_first_pass(twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, policy="spread", passes=6) as m:
        s = blockstream.session(m)
        guessed = [x.execute_s for x in s.plan.schedule.stages[0].segments]
        m(noise())
        assert s.facts["model"].measured
        spans = [x for x in s.ledger.spans if x.kind == "execute" and x.label == "blocks.1"]
        from blockstream.streaming.costs import measured_costs

        measured = measured_costs(s.plan.schedule.stages[0], 0, s.ledger)
        (block,) = [x for x in measured.segments if x.name == "blocks.1"]
        assert block.execute_s == spans[0].seconds
        assert block.load_s > 0
        assert guessed[2] != block.execute_s


def test_a_tight_limit_is_an_error_that_names_what_works(twins):
    resident, folder = twins(toys.Stack)
    with (
        pytest.raises(BudgetError, match=r"the least is ([\d,]+) bytes") as refused,
        streamed(toys.Stack, folder, arena=8192) as m,
    ):
        m(noise())
    least = int(refused.value.args[0].rsplit("the least is ", 1)[1].split(" bytes")[0].replace(",", ""))
    with streamed(toys.Stack, folder, arena=least) as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))
