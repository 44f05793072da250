"""Configurations: validated, every problem at once in the user's terms, dumped to run again."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from blockstream.errors import ConfigError, PluginError
from blockstream.plugins import Choice, Plugins, hookimpl
from blockstream.run import json_schema as schema
from blockstream.run.config import OWN_KEYS, RunConfig, load_config, make_config, read_config
from blockstream.run.yamlfile import parse
from tests.support.packages import site_on_path

ROOT = Path(__file__).parents[2]


class Net(BaseModel):
    path: str = "tiny"
    dtype: Literal["fp32", "bf16"] = "fp32"


class Video(BaseModel):
    prompt: str
    steps: int = Field(30, ge=1)
    guidance: float = 7.0
    t5: Net = Net()
    nets: dict[str, Net] = {}
    either: Net | int = 0
    reference: Path | None = None

    @field_validator("reference")
    @classmethod
    def absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else info.context["base"] / path

    @field_validator("guidance")
    @classmethod
    def reasonable(cls, value: float) -> float:
        if value < 0:
            raise ValueError(f"guidance {value} is below 0")
        return value


class Leap(BaseModel):
    tau: float = 0.1
    beta: float = Field(1.0, alias="from")


class Required(BaseModel):
    ratio: float


class Studio:
    """A plugin with one pipeline, two samplers and two transforms."""

    @hookimpl
    def pipelines(self):
        return [
            Choice("video", lambda options: SimpleNamespace(options=options, declare=print, run=print), Video)
        ]

    @hookimpl
    def samplers(self):
        return [
            Choice("leap", lambda options: lambda flow, z: options.tau, Leap, "skips"),
            Choice("plain", lambda options: print),
        ]

    @hookimpl
    def attention_transforms(self):
        return [Choice("merge", lambda options: options, Required)]


@pytest.fixture
def plugins():
    plugins = Plugins()
    plugins.register(Studio(), "studio")
    return plugins


def make(plugins, text: str) -> RunConfig:
    return make_config(parse(text, "run.yaml"), plugins)


def problems(plugins, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(plugins, text)
    lines = str(caught.value).splitlines()
    return [line.strip() for line in lines[1:]] or [lines[0].removeprefix("run.yaml, ")]


# What is valid


def test_the_least_config_has_every_default(plugins):
    config = make(plugins, "pipeline: video\nprompt: a cat\n")
    assert (config.budget, config.arena, config.device, config.threads) == ("auto",) * 4
    assert (config.policy.ref, config.sampler.ref, config.backend) == ("auto", "euler", None)
    assert (config.attention, config.plugins, config.output) == ((), (), None)
    assert config.pipeline.options == Video(prompt="a cat")
    assert config.pipeline.build().options is config.pipeline.options


def test_every_key_of_the_engine_is_read(plugins):
    config = make(
        plugins,
        """
        pipeline: {name: studio:video}
        plugins: [builtin]
        budget: 80%
        arena: 96 MiB
        policy: spread
        device: cuda:1
        threads: 2
        backend:
        sampler: {name: leap, tau: 1e-1}
        attention: [{name: merge, ratio: 2}]
        output: out
        prompt: a cat
        """,
    )
    assert (config.budget, config.arena, config.device, config.threads) == ("80%", "96 MiB", "cuda:1", 2)
    assert (config.policy.choice.name, config.plugins, config.output) == ("spread", ("builtin",), "out")
    assert config.sampler.build()(None, None) == 0.1
    assert config.attention[0].options == Required(ratio=2)


def test_a_config_cannot_be_changed(plugins):
    config = make(plugins, "pipeline: video\nprompt: a cat\n")
    with pytest.raises(ValidationError, match="frozen"):
        config.budget = 3


def test_null_is_the_default(plugins):
    nulls = "".join(f"{key}:\n" for key in OWN_KEYS if key != "pipeline")
    config = make(plugins, f"pipeline: video\nprompt: a cat\n{nulls}")
    assert config.resolved() == make(plugins, "pipeline: video\nprompt: a cat\n").resolved()


@pytest.mark.parametrize("value", ["1000000", "3.3GiB", "'3300 MB'", "80%", "auto"])
def test_a_budget_is_bytes_an_amount_a_percentage_or_auto(plugins, value):
    make(plugins, f"pipeline: video\nprompt: a cat\nbudget: {value}\n")


def test_relative_paths_start_from_the_folder_of_the_file(plugins, tmp_path):
    (tmp_path / "run.yaml").write_text("pipeline: video\nprompt: a cat\nreference: a.png\n")
    config = load_config(tmp_path / "run.yaml", plugins=plugins)
    assert config.pipeline.options.reference == tmp_path / "a.png"


def test_the_dump_runs_the_same_again(plugins, tmp_path):
    config = make(
        plugins,
        """
        pipeline: video
        budget: 3.3GiB
        sampler: {name: leap, tau: 0.25, from: 3}
        attention: [{name: merge, ratio: 2}]
        prompt: "16:9"
        nets: {a: {dtype: bf16}}
        reference: a.png
        """,
    )
    again = make(plugins, config.dump())
    assert again.resolved() == config.resolved()
    assert again.dump() == config.dump()
    assert again.sampler.options == config.sampler.options
    assert again.pipeline.options == config.pipeline.options


# What is wrong


def test_all_problems_are_reported_at_once_in_the_order_of_their_lines(plugins):
    text = """\
pipeline: video
promt: a cat
steps: many
budjet: 3GiB
budget: 3GiBi
arena: 20%
threads: 0
device: gpu
t5: {pth: a, dtype: fp31}
nets: {x: {dtyp: 1}}
sampler: {name: leap, tua: 0.3, tau: x}
policy: spred
attention: [nope, 3, merge, {name: merge, ratio: x}]
plugins: [studoi]
backend: [torch]
guidance: -1
"""
    found = problems(plugins, text)
    expected = [
        "line 2, promt: unknown key; did you mean 'prompt'?",
        "line 3, steps: input should be a valid integer, unable to parse string as an integer, not 'many'",
        "line 4, budjet: unknown key; did you mean 'budget'?",
        "line 5, budget: '3GiBi': no unit 'GiBi'",
        "line 6, arena: '20%': a percentage is for the budget",
        "line 7, threads: 0 is no number of threads",
        "line 8, device: 'gpu' is no device",
        "line 9, t5.dtype: input should be 'fp32' or 'bf16', not 'fp31'",
        "line 9, t5.pth: unknown key; did you mean 'path'?",
        "line 10, nets.x.dtyp: unknown key; did you mean 'dtype'?",
        "line 11, sampler.tau: input should be a valid number",
        "line 11, sampler.tua: unknown key; did you mean 'tau'?",
        "line 12, policy: no policy 'spred'; did you mean 'spread'?",
        "line 13, attention.0: no attention 'nope'",
        "line 13, attention.1: write a name, or a mapping with `name` and options",
        "line 13, attention.2.ratio: missing",
        "line 13, attention.3.ratio: input should be a valid number",
        "line 14, plugins.0: no plugin 'studoi' is installed",
        "line 15, backend: write a name, or a mapping with `name` and options",
        "line 16, guidance: guidance -1.0 is below 0",
        "prompt: missing",
    ]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start), (line, start)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["pipeline: missing; name the pipeline to run"]),
        (
            "pipline: video\nprompt: x\n",
            [
                "line 1, pipline: unknown key; did you mean 'pipeline'?",
                "pipeline: missing; name the pipeline to run",
            ],
        ),
        (
            "pipeline: {name: video, steps: 3}\nprompt: x\n",
            ["line 1, pipeline.steps: write the pipeline's options at the top level"],
        ),
        ("pipeline: video\nprompt: x\nattention: merge\n", ["line 3, attention: write a list of choices"]),
        ("pipeline: video\nprompt: x\nplugins: studio\n", ["line 3, plugins: input should be a valid list"]),
        ("pipeline: video\nprompt: x\nbudget: yes\n", ["line 3, budget: 'yes' is no amount"]),
        ("pipeline: video\nprompt: x\nbudget: true\n", ["line 3, budget: True is no amount"]),
        ("pipeline: video\nprompt: x\nthreads: true\n", ["line 3, threads: True is no number"]),
        ("pipeline: video\nprompt: x\nsampler: {name: euler, a: 1}\n", ["line 3, sampler.a: unknown key"]),
        (
            "pipeline: video\nprompt: x\neither: {pth: 1}\n",
            ["line 3, either.pth: unknown key; did you mean 'path'?", "line 3, either: input"],
        ),
        ("pipeline: video\nprompt: 3\n", ["line 2, prompt: input should be a valid string, not 3"]),
    ],
)
def test_a_problem_names_its_line_key_and_remedy(plugins, text, expected):
    found = problems(plugins, text)
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_a_problem_with_a_set_names_the_set(plugins, tmp_path):
    (tmp_path / "run.yaml").write_text("pipeline: video\nprompt: a cat\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, --set steps: input should be a valid integer"):
        load_config(tmp_path / "run.yaml", ["steps=many"], plugins)
    with pytest.raises(ConfigError, match=r"--set t5, t5.dtyp: unknown key; did you mean 'dtype'"):
        load_config(tmp_path / "run.yaml", ["t5={dtyp: fp32}"], plugins)


def test_a_plugin_that_fails_ends_validation_with_its_blame(plugins):
    class Broken:
        @hookimpl
        def samplers(self):
            raise RuntimeError("no GPU")

    plugins.register(Broken(), "broken")
    with pytest.raises(PluginError, match="plugin 'broken', hook samplers: RuntimeError: no GPU"):
        make(plugins, "pipeline: video\nprompt: x\nsampler: unknown\n")


# Names of files


@pytest.mark.parametrize("target", ["mine:configs/mine.yaml", "mine.configs"])
def test_a_name_that_is_no_file_is_a_packaged_example(tmp_path, monkeypatch, target):
    files = {"mine/__init__.py": "", "mine/configs/mine.yaml": "pipeline: video\nprompt: x\n"}
    files |= {"mine/configs/__init__.py": ""}
    groups = {"blockstream.examples": {"mine.yaml": target}}
    monkeypatch.chdir(tmp_path)
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        site.install("mine", files, groups)
        for name in ("mine.yaml", "mine"):
            document = read_config(name, ["steps=3"])
            assert document.data == {"pipeline": "video", "prompt": "x", "steps": 3}
            assert (document.name, document.packaged) == ("mine.yaml", "mine 1.0")
            assert document.base == tmp_path / "site" / "mine" / "configs"
        (tmp_path / "mine.yaml").write_text("pipeline: other\n")
        document = read_config("mine.yaml")
        assert (document.data, document.packaged) == ({"pipeline": "other"}, None)
        with pytest.raises(ConfigError, match=r"min\.yaml does not exist.*did you mean 'mine.yaml'"):
            read_config("min.yaml")
        with pytest.raises(ConfigError, match="is not a file"):
            read_config(tmp_path)


def test_the_examples_of_this_package_are_named_as_setuptools_can_build_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["blockstream.examples"]
    assert len(named) > 2
    for name, package in named.items():
        assert all(part.isidentifier() for part in package.split(".")), package
        assert (ROOT / "examples" / name).is_file()


@pytest.mark.parametrize("target", ["gone:mine.yaml", "mine:gone.yaml", "mine"])
def test_a_packaged_example_that_is_not_there_is_blamed_on_its_package(tmp_path, monkeypatch, target):
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        groups = {"blockstream.examples": {"mine.yaml": target}}
        site.install("mine", {"mine/__init__.py": ""}, groups)
        with pytest.raises(ConfigError, match=r"mine.yaml: mine 1.0 lists it, but: "):
            read_config("mine.yaml")


def test_a_problem_with_the_options_as_a_whole_is_placed_at_all_of_it(plugins):
    class Whole(BaseModel):
        @model_validator(mode="after")
        def fits(self):
            raise ValueError("too many pixels")

    class Second:
        @hookimpl
        def pipelines(self):
            return [Choice("second", print, Whole)]

    plugins.register(Second(), "second")
    assert problems(plugins, "pipeline: second\n") == ["all of it: too many pixels"]


# JSON Schema


def config_schema(plugins, *names: str):
    return schema.config_schema(schema.offered_by(plugins, ["builtin", *names]))


def test_the_schema_has_the_keys_of_the_engine_and_of_the_pipeline(plugins):
    found = config_schema(plugins, "studio")
    assert set(found["properties"]) == {*OWN_KEYS, *Video.model_fields}
    assert found["properties"]["pipeline"] == {"enum": ["studio", "studio:video"]}
    assert (found["required"], found["additionalProperties"]) == (["pipeline", "prompt"], False)
    assert found["$defs"]["Net"]["additionalProperties"] is False
    json.dumps(found)


def test_the_schema_offers_names_and_mappings_with_the_options_of_each_choice(plugins):
    names, bare, leap = config_schema(plugins, "studio")["properties"]["sampler"]["anyOf"]
    assert names == {"enum": ["euler", "studio:leap", "studio:plain"]}
    assert bare["properties"] == {"name": {"enum": ["euler", "studio:plain"]}}
    assert leap["properties"].keys() == {"name", "tau", "from"}
    assert (leap["required"], leap["additionalProperties"]) == (["name"], False)


def test_a_choice_with_a_required_option_cannot_be_a_bare_name(plugins):
    items = config_schema(plugins, "studio")["properties"]["attention"]["items"]
    (mapping,) = items["anyOf"]
    assert mapping["required"] == ["name", "ratio"]


def test_the_schema_without_a_pipeline_leaves_other_keys_open(plugins):
    found = config_schema(plugins)
    assert set(found["properties"]) == set(OWN_KEYS)
    assert found["additionalProperties"] is True
    assert found["properties"]["attention"]["items"] == {"not": {}}


def test_the_schema_of_several_pipelines_is_any_of_theirs(plugins):
    class Second:
        @hookimpl
        def pipelines(self):
            return [Choice("second", print, Required)]

    plugins.register(Second(), "second")
    first, second = config_schema(plugins, "studio", "second")["anyOf"]
    assert "prompt" in first["properties"] and "ratio" not in first["properties"]
    assert second["required"] == ["pipeline", "ratio"]
