"""The least arena named of a session is one that its model streams in, and nothing below is."""

from __future__ import annotations

import pytest
import torch

import blockstream
from blockstream.errors import BudgetError
from blockstream.streaming.model_plan import plan_model
from tests.support.models import CASES, assert_same, save
from tests.support.streamed import least_of

NAMED = ("t5-encoder", "llama", "vit", "hunyuan-video")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMED], ids=str)
def test_a_model_streams_in_the_finest_arena_and_in_none_much_smaller(case, tmp_path):
    torch.manual_seed(0)
    module = case.make().eval()
    folder = save(module, tmp_path / "w")
    with blockstream.Session(arena="1GiB") as s:
        s.stage("m", case.make, folder)
        finest = s.finest_arena_nbytes
    assert finest <= least_of(case.make, folder)
    with torch.no_grad():
        with blockstream.stream(case.make, folder, arena="1GiB") as m:
            want = case.run(m)
        with blockstream.stream(case.make, folder, arena=finest) as m:
            assert_same(case.run(m), want)
        with pytest.raises(BudgetError), blockstream.stream(case.make, folder, arena=finest // 2) as m:
            case.run(m)


def test_a_plan_names_what_a_finer_cut_needs(tmp_path):
    from tests.support.t5_folders import t5_folder

    folder = t5_folder(tmp_path / "t5", d_model=512, d_ff=2048, num_heads=8, d_kv=64)
    plan = plan_model(str(folder), ["budget=4GiB"])
    assert plan["least_nbytes"] < plan["curve"][0]["budget_nbytes"]
    assert any(said.endswith("with segments cut finer") for said in plan["advice"]) == (
        plan["least_nbytes"] < 0.98 * plan["curve"][0]["budget_nbytes"]
    )
