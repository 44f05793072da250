"""One model is planned from whatever there is of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from blockstream.errors import BlockstreamError, BudgetError, CheckpointError, ConfigError
from blockstream.module.partition import partition
from blockstream.streaming.model_plan import imagined, plan_model, skeleton

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 99,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(BERT))
    return tmp_path / "bert"


@pytest.fixture
def weights(config):
    from transformers import BertConfig, BertModel

    save_file(BertModel(BertConfig(**BERT)).state_dict(), config / "model.safetensors")
    return config


def the_stage(plan):
    (stage,) = plan["stages"]
    return stage


def test_a_config_alone_is_enough(config):
    plan = plan_model(str(config), ["passes=5", "arena=1MiB"])
    assert the_stage(plan)["passes"] == 5
    assert the_stage(plan)["name"] == "bert"
    assert {k: v for k, v in the_stage(plan)["kinds"][1].items() if k in ("name", "count")} == {
        "name": "encoder.layer.*",
        "count": 4,
    }
    assert plan == json.loads(json.dumps(plan))


def test_a_config_and_its_weights_plan_alike(config, weights):
    found = plan_model(str(weights), ["arena=1MiB"])
    (weights / "model.safetensors").unlink()
    alone = plan_model(str(config), ["arena=1MiB"])
    assert the_stage(found)["retained"] == the_stage(alone)["retained"]
    assert the_stage(found)["slots"] == the_stage(alone)["slots"]


def test_headers_alone_are_enough(weights):
    plan = plan_model(str(weights / "model.safetensors"), [])
    assert "encoder.layer.*" in {k["name"] for k in the_stage(plan)["kinds"]}


def test_a_folder_whose_config_nobody_knows_is_planned_from_its_headers(weights):
    (weights / "config.json").write_text(json.dumps({**BERT, "architectures": ["HomeMadeModel"]}))
    assert "encoder.layer.*" in {k["name"] for k in the_stage(plan_model(str(weights), []))["kinds"]}


def test_a_family_is_planned_by_name():
    plan = plan_model("stdit3-xl-2", ["passes=30", "budget=3.3GiB", "dtype=bf16"])
    assert the_stage(plan)["segments"] == 57
    assert plan["peak_nbytes"] <= plan["budget"]["nbytes"] == int(3.3 * (1 << 30))
    assert plan["curve"][0]["predicted_s"] >= plan["predicted_s"]
    assert plan["advice"][0].endswith("the least that works")


def test_nothing_of_a_model_is_left_behind(weights):
    before = sorted(weights.rglob("*"))
    plan_model(str(weights), [])
    assert sorted(weights.rglob("*")) == before


@pytest.mark.parametrize(
    ("ref", "sets", "error", "message"),
    [
        ("bert", ["pases=3"], ConfigError, "unknown key; did you mean 'passes'"),
        ("bert", ["passes=0"], ConfigError, "passes"),
        ("bert", ["policy=lru"], ConfigError, "policy"),
        ("bert", ["budget=lots"], ConfigError, "no amount of memory"),
        ("bert", ["arena=1KiB"], BudgetError, "the least is"),
        ("stdit3-xl-3", [], ConfigError, "did you mean 'stdit3-xl-2'"),
        ("empty", [], ConfigError, "without a config.json"),
        ("broken.safetensors", [], CheckpointError, "broken.safetensors"),
    ],
)
def test_what_cannot_be_planned_is_named(config, tmp_path, monkeypatch, ref, sets, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(BlockstreamError, match=message) as found:
        plan_model(ref, sets)
    assert isinstance(found.value, error)


def test_a_shard_that_is_missing_is_named(weights):
    (weights / "model.safetensors").rename(weights / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="fetch the rest"):
        plan_model(str(weights), [])


def test_imagined_weights_have_the_sizes_of_real_ones():
    made = imagined({"a": ("F32", (2, 3)), "b": ("BF16", (4,))}, __import__("pathlib").Path("nowhere"))
    assert [(e.name, e.offset, e.nbytes) for e in made.entries.values()] == [("a", 0, 24), ("b", 24, 8)]


def test_a_skeleton_has_the_blocks_of_the_names():
    shapes = {f"net.layers.{i}.w": ("F32", (8, 8)) for i in range(3)} | {"head.w": ("F32", (8,))}
    module = skeleton(imagined(shapes, __import__("pathlib").Path("nowhere")))
    cut = partition(module, lambda name: 256)
    assert [p.entry for p in cut.parts if p.entry] == ["net.layers.0", "net.layers.1", "net.layers.2"]
    assert all(p.device == torch.device("meta") for p in module.parameters())
