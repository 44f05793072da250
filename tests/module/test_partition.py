"""Where modules are cut: repeated blocks wherever they are, and what is left outside them."""

from __future__ import annotations

import pytest
from torch import nn

import blockstream
from blockstream.module.partition import partition
from tests.support import models, toys
from tests.support.toys import Block, D


def cut(module, **options):
    sizes = {name: p.numel() * 4 for name, p in module.named_parameters(remove_duplicate=False)}
    return partition(module, sizes.__getitem__, **options)


def names(module, **options):
    return [p.name for p in cut(module, **options).parts]


def numbered(path, n):
    return [f"{path}.{i}" for i in range(n)]


def bound(parts):
    return sorted(x.path for p in parts for places in p.params for x in places)


@pytest.mark.parametrize(
    "factory",
    [toys.Stack, toys.Zipped, toys.Tied, toys.SharedInside, toys.Peeks, toys.Towers, toys.Outside, toys.Plain]
    + [c.make for c in models.CASES],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"finer": 3000}, {"resident_nbytes": 0}, {"gather_nbytes": 0, "resident_nbytes": 0}, {"finer": 1}],
    ids=str,
)
def test_every_place_of_every_parameter_is_in_one_segment_or_table(factory, options):
    module = factory()
    found = cut(module, **options)
    tables = [x.path for places in found.tables for x in places]
    everything = [
        f"{path}.{name}" if path else name
        for path, m in module.named_modules()
        for name, p in m._parameters.items()
        if p is not None
    ]
    assert sorted(bound(found.parts) + tables) == sorted(everything)
    entries = [p.entry for p in found.parts]
    assert len(set(entries)) == len(entries)
    modules = dict(module.named_modules())
    for part in found.parts:
        if part.entry is not None:
            inside = {id(m) for m in modules[part.entry].modules()}
            assert all(id(modules[x.module]) in inside for places in part.params for x in places)
            others = [e for e in entries if e is not None and e != part.entry]
            assert not any(e.startswith(f"{part.entry}.") for e in others), "segments do not nest"


@pytest.mark.parametrize(
    ("factory", "blocks"),
    [
        (toys.Zipped, numbered("spatial", 3) + numbered("temporal", 3)),
        (toys.Towers, numbered("encoder.blocks", 3) + numbered("decoder.blocks", 5)),
        (toys.Codec, numbered("encoder", 3) + numbered("decoder", 3)),
        (toys.Attention, numbered("encoder.layers", 3)),
        (models.t5, numbered("encoder.block", 3) + numbered("decoder.block", 3)),
        (models.bart, numbered("model.encoder.layers", 3) + numbered("model.decoder.layers", 3)),
        (models.mixtral, numbered("model.layers", 3)),
        (models.gpt2, numbered("transformer.h", 4)),
        (
            models.hunyuan,
            numbered("context_embedder.token_refiner.refiner_blocks", 2)
            + numbered("transformer_blocks", 2)
            + numbered("single_transformer_blocks", 3),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_blocks_are_found(factory, blocks):
    found = [n for n in names(factory()) if n != "rest"]
    big = [b for b in blocks if b in found]
    assert big == found
    assert set(blocks) - set(found) <= set(numbered("context_embedder.token_refiner.refiner_blocks", 2))


def test_the_outermost_list_counts():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    module = nn.Sequential(*(Expert() for _ in range(3)))
    assert names(module) == ["0", "1", "2"]


def test_a_list_of_stacks_is_opened_where_the_library_names_its_blocks():
    class Two(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList(toys.Stack(3) for _ in range(2))

    assert [n for n in names(Two()) if n != "rest"] == numbered("towers.0.blocks", 3) + numbered(
        "towers.1.blocks", 3
    )


def test_blocks_above_the_limit_are_cut_and_leaves_are_not():
    module = toys.Stack(2)
    limit = 4 * (D * 2 * D + 2 * D)
    found = names(module, finer=limit)
    assert {"blocks.0.norm", "blocks.0.up", "blocks.0.down", "blocks.1.up"} <= set(found)
    assert names(module, finer=1 << 30) == names(module)


def test_small_items_of_lists_are_no_segments():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.time = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    assert names(Mlp()) == ["rest", "blocks.0", "blocks.1"]


def test_a_parameter_of_two_blocks_stays_resident():
    found = cut(toys.Tied())
    (rest,) = [p for p in found.parts if p.resident]
    shared = [places for places in rest.params if len(places) == 2]
    assert [sorted(x.path for x in places) for places in shared] == [
        ["embed.weight", "head.weight"],
        ["blocks.0.up.weight", "blocks.2.up.weight"],
    ]


def test_a_module_of_all_blocks_stays_resident():
    found = cut(toys.SharedInside())
    assert bound(p for p in found.parts if p.resident) == ["blocks.0.shared.bias", "blocks.0.shared.weight"]


def test_only_lookups_by_row_are_gathered():
    class Own(nn.Embedding):
        def forward(self, ids):
            return self.weight[ids]

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Embedding(9, D)
            self.scaled = Scaled(9, D)
            self.own = Own(9, D)
            self.clipped = nn.Embedding(9, D, max_norm=1.0)
            self.bag = nn.EmbeddingBag(9, D)
            self.small = nn.Embedding(2, D)

    found = cut(Words(), gather_nbytes=9 * D * 4)
    assert [places[0].path for places in found.tables] == ["plain.weight", "scaled.weight"]


def test_what_lies_outside_goes_largest_first_until_the_rest_is_small():
    assert names(toys.Outside(), resident_nbytes=0)[0] == "rest"
    everything = names(toys.Outside(), resident_nbytes=1 << 20)
    assert everything == ["rest", "blocks.0", "blocks.1"]


def test_t5_xxl_is_cut_into_its_blocks_and_a_table():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with blockstream.empty():
        module = T5EncoderModel(config)
    found = cut(module)
    assert [p.name for p in found.parts] == ["rest", *numbered("encoder.block", 24)]
    assert {x.path for x in found.tables[0]} >= {"shared.weight"}
