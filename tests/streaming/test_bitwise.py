"""Streamed equals resident, bit for bit: models x arenas x policies x slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.packer import pack
from blockstream.module.empty import empty
from blockstream.module.spec import packing
from blockstream.plan.planner import least_arena
from tests.support.models import CASES, Case, aligned, assert_same, minilm_folder, save

POLICIES = ["none", "prefix", "spread", "auto"]


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """Return (checkpoint, resident module, its result) of a case, made once."""
    made: dict[str, tuple] = {}

    def get(case: Case):
        if case.name not in made:
            torch.manual_seed(0)
            module = case.make()
            folder = save(module, tmp_path_factory.mktemp(case.name))
            module = aligned(module)
            with torch.no_grad():
                made[case.name] = folder, case.run(module)
        return made[case.name]

    return get


def least(module, folder) -> int:
    with blockstream.Session(arena="1GiB") as s:
        s.stage("m", module, folder)
        return least_arena(s.draft().schedule)


#: Room in parts of the least, and policy: every plan there is, as the test after this one says.
GRID = [(1.0, "none"), *((1.4, policy) for policy in POLICIES), (10.0, "none"), (10.0, "auto")]


@pytest.mark.parametrize(
    ("room", "policy"), GRID, ids=lambda x: {1.0: "least", 1.4: "some", 10.0: "all"}.get(x, x)
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_streamed_equals_resident(case, room, policy, resident):
    folder, want = resident(case)
    with empty():
        module = case.make().eval()
    arena = int(room * least(module, folder))
    with torch.no_grad(), blockstream.stream(module, folder, arena=arena, policy=policy) as m:
        for _ in range(2):
            assert_same(case.run(m), want)
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("room", [1.0, 10.0], ids=["least", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_least_and_in_all_the_room_policies_that_retain_make_one_plan(case, room, resident):
    folder, _ = resident(case)
    with empty():
        module = case.make().eval()
    arena = int(room * least(module, folder))
    plans = []
    for policy in POLICIES if room == 1.0 else set(POLICIES) - {"none"}:
        with blockstream.Session(arena=arena, policy=policy) as s:
            s.stage("m", module, folder, passes=None)
            plans.append(s.draft().stages[0])
    kept = {(p.slots, tuple(sorted(p.retained))) for p in plans}
    assert len(kept) == 1, kept


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("t5-encoder", "hunyuan-video")], ids=str)
def test_streamed_equals_resident_for_any_number_of_slots(case, slots, resident):
    folder, want = resident(case)
    with blockstream.Session(arena="2MiB", policy="none", slots=slots) as s, torch.inference_mode():
        m = s.stage("m", case.make, folder, passes=3)
        for _ in range(3):
            assert_same(case.run(m), want)
        assert s.plan.stages[0].slots == slots


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("t5-encoder", "gpt2-generate-3")], ids=str)
def test_converted_weights_give_what_the_converted_module_gives(case, dtype, tmp_path):
    torch.manual_seed(0)
    module = case.make()
    folder = save(module, tmp_path / "w")
    for name, p in module.named_parameters():
        keep = dtype == "float16" and any(
            k in name for k in getattr(module, "_keep_in_fp32_modules", None) or ()
        )
        p.data = p.data.to(torch.float32 if keep else getattr(torch, dtype))
    with torch.no_grad():
        want = case.run(aligned(module))
        with blockstream.stream(case.make, folder, arena="1MiB", dtype=dtype) as m:
            assert m.dtype == getattr(torch, dtype)
            assert_same(case.run(m), want)


def test_a_file_in_half_precision_is_streamed_in_half_precision(tmp_path):
    torch.manual_seed(0)
    case = CASES[0]
    module = case.make().to(torch.bfloat16)
    folder = save(module, tmp_path / "w")
    with torch.no_grad():
        want = case.run(aligned(module))
        with blockstream.stream(case.make, folder, arena="1MiB") as m:
            assert_same(case.run(m), want)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arena", ["16MiB", "30MiB", "60MiB"])
def test_real_bert_streamed_equals_resident(arena, policy):
    from transformers import BertModel

    folder = minilm_folder()
    reference = aligned(BertModel.from_pretrained(folder))
    ids = torch.randint(0, 30000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        want = reference(input_ids=ids, attention_mask=mask)
        with blockstream.from_pretrained(folder, arena=arena, policy=policy) as m:
            for _ in range(3):
                assert_same(m(input_ids=ids, attention_mask=mask), want)


def test_sharded_bin_and_packed_checkpoints_are_streamed_as_they_are(tmp_path: Path):
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    case = CASES[0]
    module = case.make()
    module.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    (tmp_path / "bin").mkdir()
    torch.save(module.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    what = packing(case.make(), Checkpoint.open(tmp_path / "sharded"), None)
    pack(tmp_path / "sharded", tmp_path / "packed", what.segments, float32=what.float32, made=what.made)
    config = module.config
    with torch.no_grad():
        want = case.run(aligned(module))
        for form in ("sharded", "bin", "packed"):
            with blockstream.stream((T5EncoderModel, config), tmp_path / form, arena="1MiB") as m:
                assert_same(case.run(m), want)
