"""Temporal token merging of On-device-Sora through the attention seam, by a merge written for the test."""

import pytest
import torch

from blockstream.module.attention import attention_hooks
from blockstream.plugins import Merge
from movd.attention import attention_layers
from movd.official import load_official
from movd.stdit3 import STDiT3, STDiT3Config

pytestmark = pytest.mark.golden
FOLDER = "stdit3_tdtm_tiny"
CASES = [
    "T8_step0",
    "T7_step1",
    "T15_step2",
    "T5_nomerge_step3",
    "T8_xmask_step0",
    "unofficial_T5_step0",
    "unofficial_T6_step0",
]


@pytest.fixture(scope="module")
def model(golden, folder_of):
    model = STDiT3(STDiT3Config(**golden.meta["config"]))
    load_official(model, folder_of("stdit3_tiny").weights)
    return model.eval().requires_grad_(False)


def pairs(active):
    """The reference's merge: frames (0, 1), (2, 3), ...; an odd last frame is dropped, then patched."""

    def merge_of(layer):
        def merge(x):
            return x[:, : layer.T // 2 * 2].unflatten(1, (-1, 2)).mean(2)

        def unmerge(x):
            twice = x.repeat_interleave(2, dim=1)
            return torch.cat((twice, x[:, -1:]), 1) if layer.T % 2 else twice

        return Merge(merge, unmerge, torch.arange(layer.T // 2), lambda: active)

    return merge_of


@pytest.mark.parametrize("case", CASES)
def test_merging_through_the_seam_equals_the_reference(model, golden, case):
    given, settings = golden.given(case), golden.meta["cases"][case]
    given.pop("step")
    grid = model.grid(*given["x"].shape[2:])
    assert settings["merged"] == (settings["step"] < settings["merge_steps"])
    with attention_hooks(
        attention_layers(model, grid, given["y"].shape[2]),
        token_merge=pairs(settings["merged"]),
    ) as changed:
        assert len(changed) == 4 * model.config.depth
        out = model(**given)
    golden.close(out, golden.expected(case)["out"], case)
    if settings["merged"]:
        assert (model(**given) - out).abs().max() > 1e-2  # cleared: no longer merged
