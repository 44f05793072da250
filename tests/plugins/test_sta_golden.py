"""Sliding tile attention against the authors' own: order, tile masks and outputs."""

from shutil import which

import pytest
import torch
from blockstream_sta.tiles import Tiling

pytestmark = pytest.mark.golden
FOLDER = "sta_tiny"
CASES = ["text", "notext_even", "shapes"]


def case_of(golden, name):
    settings = golden.meta["cases"][name]
    return settings, Tiling(tuple(settings["canvas"]), tuple(settings["tile"]))


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_tiles_equals_the_authors(golden, case):
    _, tiling = case_of(golden, case)
    assert tiling.order() == golden.expected(case)["order"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_every_tile_sees_what_the_authors_rule_lets_it_see(golden, case):
    settings, tiling = case_of(golden, case)
    tiles = list(torch.cartesian_prod(*(torch.arange(n) for n in tiling.tiles)).tolist())
    for head, window in enumerate(settings["windows"]):
        seen = [
            [
                all(a <= b < c for b, (a, c) in zip(other, boxes(tiling, window, tile), strict=True))
                for other in tiles
            ]
            for tile in tiles
        ]
        assert torch.equal(torch.tensor(seen), golden.expected(case)["tile_mask"][head].bool()), window


def boxes(tiling, window, tile):
    return [
        (low // size, -(-high // size))
        for (low, high), size in zip(tiling.seen(window, tile), tiling.tile, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_gathered_windows_equal_the_authors_output(golden, case):
    from blockstream_sta.gathered import attend

    settings, tiling = case_of(golden, case)
    given, want = golden.given(case), golden.expected(case)["out"]
    real = want.shape[1] - settings["text_max"] + settings["text_length"]
    q, k, v = (given[name][:, :real].transpose(1, 2) for name in "qkv")
    out = attend(q, k, v, tiling, [tuple(w) for w in settings["windows"]], settings["text_length"])
    golden.close(out.transpose(1, 2), want[:, :real], case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the processor by a C++ compiler")
@pytest.mark.parametrize("case", CASES)
def test_compiled_flex_attention_equals_the_authors_output(golden, case, monkeypatch):
    from blockstream_sta import flex

    settings, tiling = case_of(golden, case)
    monkeypatch.setattr(flex, "BLOCKS", (16, 8))
    given, want = golden.given(case), golden.expected(case)["out"]
    real = want.shape[1] - settings["text_max"] + settings["text_length"]
    q, k, v = (given[name][:, :real].transpose(1, 2) for name in "qkv")
    windows = [tuple(w) for w in settings["windows"]]
    out = flex.Flex(tiling).attend(q, k, v, windows, settings["text_length"])
    golden.close(out.transpose(1, 2), want[:, :real], case)
