"""What the page may set: told from the schema, never a path; a config from what it sends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blockstream_web.fields import accepted, field_of, fields_of
from blockstream_web.presets import load_presets

from blockstream.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def movd(presets):
    return presets["movd.yaml"]


def kind(key, schema):
    found = field_of(key, schema)
    return found and (found["kind"], found["empty"])


def test_kinds_follow_the_schema():
    assert kind("n", {"type": "integer", "minimum": 1}) == ("integer", False)
    assert kind("n", {"anyOf": [{"type": "number"}, {"type": "null"}]}) == ("number", True)
    assert kind("n", {"type": "boolean"}) == ("switch", False)
    assert kind("n", {"enum": ["a", "b"]}) == ("choice", False)
    assert kind("n", {"anyOf": [{"const": "auto"}, {"enum": [1, 2]}]}) == ("choice", False)
    assert kind("n", {"type": "array", "items": {"enum": ["a"]}}) == ("several", False)
    share = [{"type": "integer"}, {"type": "number"}, {"type": "string", "pattern": "%$"}]
    assert kind("n", {"anyOf": share}) == ("number", False)
    assert kind("budget", {"anyOf": [{"type": "integer"}, {"type": "string"}]}) == ("text", False)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "format": "path"},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"type": "array", "items": {"type": "string"}},
        {"$ref": "#/$defs/Model"},
        {"type": "object"},
        {},
    ],
)
def test_what_could_be_a_path_is_no_field(schema):
    assert field_of("weights", schema) is None


def test_movd_offers_what_a_video_needs_and_no_file(movd):
    keys = {field["key"] for field in movd.fields}
    assert {"seed", "frames", "steps", "sampler", "attention", "budget", "policy"} <= keys
    assert not keys & {"t5", "dit", "vae", "reference", "prompts", "output", "cache", "plugins", "backend"}
    by_key = {field["key"]: field for field in movd.fields}
    assert [o["name"] for o in by_key["sampler"]["offers"]] == ["euler", "lpl"]
    attention = {o["name"]: {f["key"] for f in o["fields"]} for o in by_key["attention"]["offers"]}
    assert set(attention) == {"sta", "tdtm"}, "sta:search wants a file to write"
    assert "table" not in attention["sta"] and "merge_steps" in attention["tdtm"]
    assert movd.takes_prompts and movd.takes_reference and len(movd.prompts) == 10


def test_a_page_is_told_no_path(movd):
    assert str(ROOT) not in json.dumps(movd.public())
    assert "path" not in movd.values


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"t5": {"path": "/etc"}}, "'t5' is not for the page to set"),
        ({"reference": "/etc/passwd"}, "'reference' is not for the page"),
        ({"prompts": "/etc/passwd"}, "'prompts' is not for the page"),
        ({"output": "/tmp/x"}, "'output' is not for the page"),
        ({"plugins": ["os"]}, "'plugins' is not for the page"),
        ({"seed": "3"}, "seed: '3' is no value"),
        ({"seed": True}, "seed: True is no value"),
        ({"seed": None}, "seed: None is no value"),
        ({"seed": -1}, "seed"),
        ({"frames": 2}, "frames"),
        ({"int8": "fast"}, "int8: 'fast' is no value"),
        ({"budget": "x" * 1001}, "budget: "),
        ({"budget": "lots"}, "budget"),
        ({"sampler": "no"}, "sampler: 'no' is not offered here (offered: euler, lpl)"),
        ({"sampler": {"name": "lpl", "file": 1}}, "'file' is not for the page to set"),
        ({"sampler": ["lpl"]}, "sampler: "),
        ({"attention": "tdtm"}, "attention: write a list"),
        ({"attention": ["tdtm"] * 3}, "attention: write a list"),
        ({"attention": [{"name": "sta", "table": "/etc/passwd"}]}, "'table' is not for the page to set"),
        ({"attention": ["sta:search"]}, "is not offered"),
        ({"attention": [{"name": "tdtm", "kinds": ["all"]}]}, "kinds: "),
    ],
)
def test_what_is_not_the_pages_to_set_is_refused_by_name(movd, settings, said):
    with pytest.raises(ConfigError, match=r"\w") as raised:
        movd.config({"settings": settings, "prompts": ["a"]})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "asked",
    [
        {"settings": []},
        {"prompts": "/etc/passwd"},
        {"prompts": [3]},
        {"prompts": [" "]},
        {"prompts": ["a"] * 101},
    ],
)
def test_a_request_of_another_shape_is_refused(movd, asked):
    with pytest.raises(ConfigError):
        movd.config(asked)


def test_what_is_set_is_what_the_run_gets(movd):
    settings = {
        "seed": 7,
        "height": 32,
        "width": 32,
        "attention": [{"name": "tdtm", "factor": 4}],
        "policy": "spread",
    }
    config = movd.config({"settings": settings, "prompts": ["one", "two"]})
    assert config.pipeline.options.prompts == ("one", "two")
    assert (config.pipeline.options.seed, config.pipeline.options.size) == (7, (32, 32))
    assert config.attention[0].options.factor == 4
    assert config.output is None
    assert movd.config({}).pipeline.options.prompts == tuple(movd.prompts)


def test_an_upload_becomes_the_reference(movd, tmp_path):
    config = movd.config({"prompts": ["a"]}, tmp_path / "0001.png")
    assert config.pipeline.options.reference == str(tmp_path / "0001.png")


def test_a_preset_keeps_a_choice_that_the_page_may_not_make(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pipeline: movd\nprompt: a\nattention: [{name: sta, table: windows.json}]\n")
    (mine,) = load_presets([str(path)]).values()
    assert mine.name == "mine.yaml" and "attention" not in {f["key"] for f in mine.fields}
    assert mine.config({}).attention[0].options.table is not None
    with pytest.raises(ConfigError):
        mine.config({"settings": {"attention": []}})


def test_without_a_name_all_packaged_configs_are_presets():
    found = load_presets([])
    assert next(iter(found)) == "movd.yaml" and {"phone.yaml", "laptop.yaml"} <= set(found)


def test_a_config_that_is_wrong_or_named_twice_is_refused_at_the_start(tmp_path):
    wrong = tmp_path / "a.yaml"
    wrong.write_text("pipeline: movd\n")
    with pytest.raises(ConfigError, match="write prompt or prompts"):
        load_presets([str(wrong)])
    with pytest.raises(ConfigError, match=r"two configs are called movd\.yaml"):
        load_presets(["movd.yaml", "movd"])


def test_fields_have_an_order_and_a_group(movd):
    groups = [
        field["group"]
        for field in fields_of({"properties": {"zeta": {"type": "integer"}, "seed": {"type": "integer"}}})
    ]
    assert groups == ["first", "more"]
    assert accepted(movd.fields, {"guidance": 3}) == {"guidance": 3}
