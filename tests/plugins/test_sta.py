"""Sliding tile attention as a plugin: which layers and steps, from which source, said in the report."""

import json
import math
from dataclasses import replace
from shutil import which

import blockstream_sta
import pytest
import torch
from blockstream_sta.gathered import attend
from blockstream_sta.options import Options, SearchOptions
from blockstream_sta.search import WindowSearch, choose
from blockstream_sta.table import Table, Uniform
from blockstream_sta.tiles import Tiling, width
from blockstream_sta.transform import SlidingTiles
from pydantic import ValidationError
from torch.nn.functional import scaled_dot_product_attention

from blockstream.errors import ConfigError
from blockstream.plugins import AttentionLayer, Plugins, new_run

GRID, TILE, TEXT = (4, 4, 6), (2, 2, 2), 3
LAYER = AttentionLayer("blocks.1.attn", "full", GRID, width=8, heads=2, trailing=TEXT, index=1, layers=2)
TOKENS = math.prod(GRID)
HUNYUAN = AttentionLayer(
    "transformer_blocks.0.attn", "full", (30, 48, 80), width=3072, heads=24, trailing=256, index=0, layers=60
)


def qkv(tokens=TOKENS + TEXT, heads=2):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 4, generator=random) for _ in range(3)]


def dense_with_mask(q, k, v, tiling, windows, text):
    """Attention under the whole mask, written token by token from the rule."""
    video = math.prod(tiling.canvas)
    keep = torch.ones(len(windows), video + text, video + text, dtype=torch.bool)
    places = torch.cartesian_prod(*(torch.arange(n) for n in tiling.canvas))
    for head, window in enumerate(windows):
        for axis, (size, n, k_) in enumerate(zip(tiling.tile, tiling.tiles, window, strict=True)):
            tile = places[:, axis] // size
            half = k_ // 2
            centre = tile.clamp(min=half).clamp(max=n - 1 - half)
            keep[head, :video, :video] &= (centre[:, None] - tile[None]).abs() <= half
    return scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.fixture
def run():
    with new_run() as run:
        run.step, run.steps = 5, 10
        yield run


def transform(**options):
    return SlidingTiles(Options(**{"windows": [1, 1, 1], "tile": TILE, "dense_steps": 0} | options))


# The arithmetic


@pytest.mark.parametrize("canvas", [(4, 4, 6), (5, 3, 7), (2, 2, 2), (1, 6, 5)])
@pytest.mark.parametrize("windows", [[(1, 1, 1), (3, 1, 2)], [(2, 3, 1), (9, 9, 9)]])
@pytest.mark.parametrize("text", [0, TEXT])
def test_gathered_windows_equal_the_whole_mask_on_any_canvas(canvas, windows, text):
    tiling = Tiling(canvas, TILE)
    q, k, v = qkv(math.prod(canvas) + text)
    out = attend(q, k, v, tiling, windows, text)
    torch.testing.assert_close(out, dense_with_mask(q, k, v, tiling, windows, text), atol=2e-6, rtol=1e-5)


def test_windows_over_the_whole_canvas_are_dense_attention_bit_for_bit():
    q, k, v = qkv()
    out = attend(q, k, v, Tiling(GRID, TILE), [(2, 2, 3), (9, 9, 9)], TEXT)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v))


def test_density_is_the_share_of_pairs_and_the_released_table_has_the_published_one():
    tiling = Tiling((30, 48, 80), (6, 8, 8))
    assert tiling.density((3, 3, 3)) == pytest.approx(27 / 300)
    assert tiling.density((5, 6, 10)) == 1
    assert Tiling((5, 3, 7), TILE).density((9, 9, 9)) == 1
    table = Table.released()
    assert table.density(0) == 1
    assert table.density(49) == pytest.approx(0.166, abs=1e-3)
    assert sum(map(table.density, range(50))) / 50 == pytest.approx(0.416, abs=1e-3)


@pytest.mark.parametrize(
    ("k", "n", "wide"), [(1, 5, 1), (2, 5, 3), (3, 5, 3), (4, 5, 5), (5, 6, 5), (6, 6, 6), (9, 1, 1)]
)
def test_an_even_window_is_as_wide_as_the_next_odd_one(k, n, wide):
    assert width(k, n) == wide


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(which("c++") is None, reason="torch compiles for the processor by a C++ compiler")
def test_compiled_flex_equals_the_whole_mask_where_tiles_are_cut_short(run, caplog):
    canvas = (3, 5, 8)
    layer = replace(LAYER, grid=canvas)
    windows = [(1, 1, 1), (3, 1, 2)]
    sta = transform(windows=windows, tile=(2, 2, 4), kernel="flex")
    q, k, v = qkv(math.prod(canvas) + TEXT)
    out = sta.attention_kernel(layer)(q, k, v, layer)
    want = dense_with_mask(q, k, v, Tiling(canvas, (2, 2, 4)), windows, TEXT)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert sta.report()["calls"] == {"dense": 0, "flex": 1}
    assert "no model was published" in caplog.text


# Which layers, which steps


def test_only_full_attention_over_a_grid_is_computed():
    for kind in ("spatial", "temporal", "cross"):
        assert transform().attention_kernel(replace(LAYER, kind=kind)) is None
    assert transform().attention_kernel(LAYER) is not None


def test_the_first_steps_are_dense_and_the_others_are_not(run):
    sta = transform(dense_steps=0.3)
    kernel, (q, k, v) = sta.attention_kernel(LAYER), qkv()
    dense, windowed = scaled_dot_product_attention(q, k, v), []
    for run.step in range(10):
        windowed.append(not torch.equal(kernel(q, k, v, LAYER), dense))
        assert (kernel.density() < 1) == windowed[-1]
    assert windowed == [False] * 3 + [True] * 7
    assert sta.report()["calls"] == {"dense": 3, "gathered": 7}


def test_where_no_step_is_known_only_windows_for_all_steps_apply():
    with new_run():
        assert transform(dense_steps=3).attention_kernel(LAYER).density() == 1
        assert transform(dense_steps=0.5).attention_kernel(LAYER).density() == 1
        assert transform().attention_kernel(LAYER).density() < 1


def test_density_counts_the_text_that_everything_sees(run):
    q = TOKENS
    share = Tiling(GRID, TILE).density((1, 1, 1))
    want = (share * q * q + 2 * q * TEXT + TEXT**2) / (q + TEXT) ** 2
    assert transform().attention_kernel(LAYER).density() == pytest.approx(want)


def test_text_before_the_grid_is_computed_as_text_behind_it(run):
    q, k, v = qkv()
    front = replace(LAYER, leading=TEXT, trailing=0)

    def moved(x):
        return torch.cat((x[:, :, TOKENS:], x[:, :, :TOKENS]), 2)

    behind = transform().attention_kernel(LAYER)(q, k, v, LAYER)
    before = transform().attention_kernel(front)(moved(q), moved(k), moved(v), front)
    assert torch.equal(before, moved(behind))


def test_merged_layers_run_dense_or_on_a_merged_grid_of_whole_tiles_and_the_report_says_so():
    merged = replace(LAYER, grid=(2, 4, 6), merged=True)
    sta = transform()
    assert sta.attention_kernel(merged) is not None
    assert sta.attention_kernel(replace(merged, grid=(3, 4, 6))) is None
    assert sta.report()["merged_layers_run_dense"] == 1
    released = SlidingTiles(Options())
    assert released.attention_kernel(replace(HUNYUAN, grid=(15, 48, 80), merged=True)) is None
    assert released.report()["merged_layers_run_dense"] == 1


def test_a_canvas_that_tiles_do_not_divide_is_marked(caplog):
    sta = transform()
    sta.attention_kernel(LAYER)
    assert not caplog.text
    sta.attention_kernel(replace(LAYER, grid=(5, 4, 6)))
    assert "tiles of 2x2x2 do not divide a canvas of 5x4x6" in caplog.text
    assert sta.report()["canvases"] == [
        {"grid": [4, 4, 6], "whole_tiles": True},
        {"grid": [5, 4, 6], "whole_tiles": False},
    ]


# Where windows come from


def test_the_released_table_takes_hunyuan_at_its_canvas_and_refuses_another(run):
    sta = SlidingTiles(Options())
    run.step, run.steps = 49, 50
    kernel = sta.attention_kernel(HUNYUAN)
    assert 0.03 < kernel.density() < 0.25
    run.step = 14
    assert kernel.density() == 1
    for wrong in ({"grid": (33, 48, 80)}, {"layers": 40}, {"heads": 16}):
        with pytest.raises(
            ConfigError, match=r"released table is for 30x48x80 tokens, 60 layers of 24 heads"
        ):
            sta.attention_kernel(replace(HUNYUAN, **wrong))


def test_a_run_of_another_number_of_steps_takes_the_rows_at_the_same_share_of_the_way(run):
    table = Table.released()
    run.steps = 25
    for run.step, row in ((0, 0), (7, 14), (8, 16), (24, 48)):
        want = [table.windows[n] for n in table.choice[row, 0].tolist()]
        assert list(table.at(HUNYUAN)) == want


def test_one_window_a_head_or_one_for_all(run):
    bare, one = replace(LAYER, trailing=0), Tiling(GRID, TILE).density((1, 1, 1))
    both = transform(windows=[[1, 1, 1], [3, 3, 3]]).attention_kernel(bare)
    assert both.density() == pytest.approx((one + 1) / 2)
    assert transform(windows=[[1, 1, 1]]).attention_kernel(bare).density() == pytest.approx(one)
    with pytest.raises(ConfigError, match=r"3 windows for blocks.1.attn, which has 2 heads"):
        transform(windows=[[1, 1, 1]] * 3).attention_kernel(LAYER)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"windows": [1, 1]}, "write tiles along time, height and width"),
        ({"windows": [0, 1, 1]}, "write tiles along time"),
        ({"windows": []}, "at least 1 item"),
        ({"windows": [1, 1, 1], "dense_steps": 1.5}, "write a number of steps"),
        ({"windows": [1, 1, 1], "dense_steps": True}, "write a number of steps"),
        ({"windows": [1, 1, 1], "table": "x"}, "not both"),
        ({"tile": [2, 2, 2]}, "tile goes with windows"),
        ({"table": "x", "dense_steps": 3}, "dense_steps goes with windows"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        Options(**options)


@pytest.mark.parametrize(
    "options", [{}, {"table": "/x"}, {"windows": [[1, 1, 1], [3, 2, 1]], "tile": [2, 2, 2]}]
)
def test_options_survive_being_written(options):
    made = Options(**options)
    assert Options.model_validate(json.loads(made.model_dump_json())) == made


def test_a_file_that_is_no_table_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match=r"none.safetensors.*sta search"):
        SlidingTiles(Options(table=str(tmp_path / "none.safetensors")))
    bad = tmp_path / "bad.safetensors"
    save_file({"choice": torch.zeros(1, 1, 1, dtype=torch.uint8)}, bad)
    with pytest.raises(ConfigError, match=r"bad\.safetensors"):
        SlidingTiles(Options(table=str(bad)))
    tensors = {
        "choice": torch.full((1, 1, 1), 7, dtype=torch.uint8),
        "windows": torch.ones(2, 3, dtype=torch.int32),
    }
    save_file(tensors, bad, {"canvas": "4x4x6", "tile": "2x2x2"})
    with pytest.raises(ConfigError, match=r"choice \[1, 1, 1\] of 2 windows"):
        SlidingTiles(Options(table=str(bad)))


def test_the_plugin_offers_its_transforms_by_hooks_that_exist():
    plugins = Plugins()
    plugins.register(blockstream_sta, "sta")
    offered = plugins.offers("attention", "sta")
    plugins.register(offered["sta"].build(Options(windows=[1, 1, 1], tile=TILE)), "sta:sta#0")
    with new_run():
        assert plugins.hook.attention_kernel(layer=LAYER).density() == 1
    assert plugins.said()["sta:sta"]["windows"] == Uniform.name
    assert isinstance(offered["search"].build(SearchOptions(table="t", windows=[1, 1, 1])), WindowSearch)


# The search


@pytest.mark.golden
def test_the_choice_equals_the_authors(folder_of):
    golden = folder_of("sta_tiny")
    losses, want = golden.given("search")["l2_loss"], golden.expected("search")["choice"]
    choice = choose(losses, golden.meta["cases"]["search"]["skip_time_steps"])
    assert torch.equal(choice.long(), want)


def test_a_search_finds_the_window_that_loses_nothing(run, tmp_path):
    """Head 0 looks at its own frames, head 1 at its own place: each is found, the result is dense."""
    table = tmp_path / "table.safetensors"
    options = SearchOptions(table=str(table), windows=[[1, 2, 3], [2, 1, 1]], tile=TILE, dense_steps=1)
    search = WindowSearch(options)
    places = torch.cartesian_prod(*(torch.arange(n) for n in GRID)) // 2
    first = torch.nn.functional.one_hot(places[:, 0], 2).float()
    second = torch.nn.functional.one_hot(places[:, 1] * 3 + places[:, 2], 6).float()
    q = torch.zeros(1, 2, TOKENS, 8)
    q[0, 0, :, :2], q[0, 1, :, :6] = 60 * first, 60 * second
    v = torch.randn(1, 2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    layers = [replace(LAYER, trailing=0, index=i) for i in range(2)]
    run.steps = 3
    for run.step in range(3):
        for layer in layers:
            out = search.attention_kernel(layer)(q, q, v, layer)
            assert torch.equal(out, scaled_dot_product_attention(q, q, v))
    search.run_finished(run=None, report={})
    read = Table.read(table)
    assert read.choice.tolist() == [[[2, 2]] * 2, [[0, 1]] * 2, [[0, 1]] * 2]
    assert (read.canvas, read.tile, read.windows) == (GRID, TILE, ((1, 2, 3), (2, 1, 1), (2, 2, 3)))
    sta = SlidingTiles(Options(table=str(table)))
    torch.testing.assert_close(sta.attention_kernel(layers[0])(q, q, v, layers[0]), out, atol=1e-5, rtol=1e-5)


def test_a_search_says_what_is_missing(run, tmp_path):
    from types import SimpleNamespace

    def search():
        return WindowSearch(SearchOptions(table=str(tmp_path / "t"), windows=[1, 1, 1], tile=TILE))

    with pytest.raises(ConfigError, match="no full attention over a grid"):
        search().table()
    with pytest.raises(ConfigError, match="a search cannot be resumed"):
        search().run_started(run=SimpleNamespace(resumed=True, out=tmp_path))
    with pytest.raises(ConfigError, match="leave merging out"):
        search().attention_kernel(replace(LAYER, merged=True))
    found = search()
    found.attention_kernel(LAYER)
    with pytest.raises(ConfigError, match="one table is for one canvas"):
        found.attention_kernel(replace(LAYER, grid=(2, 4, 6)))
    found = search()
    found.attention_kernel(LAYER)(*qkv(), LAYER)
    with pytest.raises(ConfigError, match=r"steps \[0, 1, .*were not taken; search with sampler: euler"):
        found.table()
