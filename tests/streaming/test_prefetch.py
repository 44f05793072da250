"""Loads run ahead of compute: within a pass, across passes, across stages, and never past an exact end."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

import blockstream
from blockstream.errors import SegmentLoadError
from blockstream.plan.segments import AtMost, Unknown
from tests.support import toys
from tests.support.models import assert_same
from tests.support.streamed import least_of, streamed
from tests.support.toys import noise

BLOCKS = [f"blocks.{i}" for i in range(4)]


def expect_during(module, path, store, following, times):
    """Hold the forward of a block until the load of `following` has begun `times()` times."""
    module.get_submodule(path).register_forward_pre_hook(lambda *_: store.expect("model", following, times()))


@pytest.mark.parametrize("example", [None, (noise(),)], ids=["registered", "from-inputs"])
def test_the_next_block_loads_while_this_one_computes_from_the_first_pass_on(example, watched, twins):
    _, folder = twins(toys.Stack)
    results = []
    with streamed(toys.Stack, folder, policy="none", passes=3, example_inputs=example) as m:
        for path, following in pairwise(BLOCKS):
            expect_during(m, path, watched, following, lambda: len(results) + 1)
        for _ in range(3):
            results.append(m(noise()))


def test_the_first_block_of_the_next_pass_loads_while_the_last_of_this_one_computes(watched, twins):
    _, folder = twins(toys.Stack)
    results = []
    with streamed(toys.Stack, folder, policy="none", passes=3) as m:
        expect_during(m, BLOCKS[-1], watched, BLOCKS[0], lambda: min(len(results) + 2, 3))
        for _ in range(3):
            results.append(m(noise()))


@pytest.mark.parametrize("policy", ["none", "prefix", "spread", "auto"])
@pytest.mark.parametrize("passes", [1, 3])
def test_nothing_is_read_past_an_exact_end(passes, policy, watched, twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, policy=policy, passes=passes) as m:
        for _ in range(passes):
            m(noise())
        plan = blockstream.session(m).plan.stages[0]
    counts = Counter(segment for _, segment in watched.loads)
    names = ["rest", *BLOCKS]
    assert set(counts) == set(names)
    for i, name in enumerate(names):
        assert counts[name] <= passes
        if i in plan.retained and policy != "auto":
            assert counts[name] == 1, name


def test_every_load_of_the_plan_without_retention_is_made_once_a_pass(watched, twins):
    _, folder = twins(toys.Stack)
    with streamed(toys.Stack, folder, policy="none", passes=4) as m:
        for _ in range(4):
            m(noise())
    counts = Counter(segment for _, segment in watched.loads)
    assert counts == {"rest": 1, **dict.fromkeys(BLOCKS, 4)}


def test_the_next_stages_head_loads_while_the_last_block_of_this_one_computes(watched, twins):
    first, one = twins(toys.Stack)
    second, two = twins(toys.Zipped)
    arena = 4 * max(least_of(toys.Stack, one), least_of(toys.Zipped, two))
    with torch.no_grad(), blockstream.open(arena=arena, policy="none") as s:
        a = s.stage("a", toys.Stack, one, passes=2)
        b = s.stage("b", toys.Zipped, two, passes=1)
        assert_same(a(noise()), first(noise()))
        a.blocks[3].register_forward_pre_hook(lambda *_: watched.expect("b", "spatial.0", 1))
        assert_same(a(noise()), first(noise()))
        assert_same(b(noise()), second(noise()))


def test_a_stage_that_ends_early_drops_what_was_loaded_for_it(watched, twins):
    first, one = twins(toys.Stack)
    second, two = twins(toys.Stack)
    with torch.no_grad(), blockstream.open(arena="1MiB") as s:
        a = s.stage("a", toys.Stack, one, passes=AtMost(9))
        b = s.stage("b", toys.Stack, two, passes=Unknown(4))
        for _ in range(2):
            assert_same(a(noise()), first(noise()))
        s.end("a")
        for _ in range(3):
            assert_same(b(noise()), second(noise()))
    assert {stage for stage, _ in watched.loads} == {"a", "b"}


def test_a_stage_may_be_called_again_after_its_end(twins):
    first, one = twins(toys.Stack)
    second, two = twins(toys.Zipped)
    with torch.no_grad(), blockstream.open(arena="1MiB") as s:
        a = s.stage("a", toys.Stack, one, passes=1)
        b = s.stage("b", toys.Zipped, two, passes=2)
        for _ in range(2):
            assert_same(a(noise()), first(noise()))
            assert_same(b(noise()), second(noise()))
        assert s.unplanned > 0


def test_the_ledger_shows_loads_beside_compute(watched, twins):
    _, folder = twins(toys.Stack)
    gate = watched.hold("model", "blocks.1")
    with streamed(toys.Stack, folder, policy="none", passes=2) as m:
        # The second block's load is held until the first computes: it cannot but overlap.
        m.blocks[0].register_forward_pre_hook(lambda *_: gate.set())
        m.blocks[0].register_forward_hook(lambda *_: watched.finished("model", "blocks.1"))
        s = blockstream.session(m)
        m(noise())
        spans = list(s.ledger.spans)
    (load,) = [x for x in spans if x.kind == "load" and x.label == "blocks.1" and x.visit.pass_index == 0]
    (compute,) = [x for x in spans if x.kind == "execute" and x.label == "blocks.0"]
    assert max(load.start_s, compute.start_s) < min(load.end_s, compute.end_s)


def test_a_load_that_fails_fails_the_forward_by_name_and_restores_the_module(watched, twins):
    _, folder = twins(toys.Stack)
    watched.fail("model", "blocks.2")
    with blockstream.empty():
        module = toys.Stack().eval()
    with streamed(module, folder, arena="1MiB") as m:
        with pytest.raises(SegmentLoadError, match=r"blocks.2.*no such luck"):
            m(noise())
        with pytest.raises(SegmentLoadError, match=r"blocks.2"):
            m(noise())
    assert all(p.is_meta for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_file_that_shrinks_while_it_streams_is_named(twins):
    _, folder = twins(toys.Stack)
    path = folder / "model.safetensors"
    with streamed(toys.Stack, folder, policy="none") as m:
        m(noise())
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(SegmentLoadError, match=r"model.safetensors.*changed"):
            for _ in range(3):
                m(noise())
