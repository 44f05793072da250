"""Going on with a run: the numerics it was begun with count, whatever its config.yaml says now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from blockstream.errors import ConfigError
from blockstream.plugins import Choice, Plugins
from blockstream.plugins.choices import Chosen
from blockstream.run.config import RunConfig
from blockstream.run.journal import Journal
from blockstream.run.resume import config_of, resumed


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = ("a cat",)
    steps: int = 3
    scale: float = 0.1
    cache: str = Field("1MiB", json_schema_extra={"numerics": False})


def make(threads=1, sampler="euler", **more):
    engine = {k: more.pop(k) for k in ("budget", "arena", "output", "plugins", "int8") if k in more}
    plugins = Plugins()
    return RunConfig(
        pipeline=Chosen("pipeline", "toy", "t", Choice("toy", print, Options), Options(**more)),
        policy=Chosen("policy", "auto", *plugins.find("policy", "auto")),
        sampler=Chosen("sampler", sampler, "t", Choice(sampler, lambda _: print)),
        threads=threads,
        **engine,
    )


def begun_with(**more):
    """Return the config of a beginning as its record has it."""
    return json.loads(json.dumps(make(**more).resolved()))


def again(was, **more):
    return resumed(make(**more), was, Path("out"))


def test_the_config_of_the_beginning_is_resumed():
    assert again(begun_with()).dump() == make().dump()


def test_automatic_threads_become_those_of_the_beginning():
    assert again(begun_with(), threads="auto").threads == 1


def test_automatic_products_of_int8_become_those_of_the_beginning():
    was = begun_with(int8="fp32")
    assert again(was).int8 == "fp32"
    with pytest.raises(ConfigError, match="int8 was 'fp32' and is 'bf16'"):
        again(was, int8="bf16")


@pytest.mark.parametrize(
    "free", [{"budget": "2GiB"}, {"arena": 5}, {"output": "x"}, {"plugins": ["lpl"]}, {"cache": "off"}]
)
def test_what_changes_no_bit_may_differ(free):
    assert again(begun_with(), **free).dump() == make(**free).dump()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 4}, "steps was 3 and is 4"),
        ({"scale": 0.2}, "scale was 0.1 and is 0.2"),
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"sampler": "leap"}, "sampler was 'euler' and is 'leap'"),
        ({"prompts": ["a dog"]}, r"prompts was \['a cat'\] and is \['a dog'\]"),
        ({"prompts": ["word"] * 9000}, r"prompts was \['a cat'\] and is \['word', .{0,60}\]\. Its rest"),
        ({"steps": 4, "threads": 2}, "threads was 1 and is 2; steps was 3 and is 4"),
    ],
)
def test_what_could_change_a_bit_is_refused_by_name(changed, said):
    with pytest.raises(ConfigError, match=f"begun with another config: {said}"):
        again(begun_with(), **changed)


def test_a_key_that_the_beginning_did_not_know_is_let_pass():
    was = begun_with()
    del was["scale"]
    assert again(was).dump() == make().dump()


def test_a_run_killed_before_its_config_was_there_goes_on_with_that_of_its_record(tmp_path):
    for no_run, said in ((tmp_path, "holds no record of a run"), (tmp_path / "none", "is no folder")):
        with pytest.raises(ConfigError, match=f"{no_run} {said}"):
            config_of(no_run)
    Journal(tmp_path).begin(make(steps=7).resolved(), {})
    assert config_of(tmp_path).data["steps"] == 7
    (tmp_path / "config.yaml").write_text("pipeline: toy\n")
    assert config_of(tmp_path) == str(tmp_path / "config.yaml")
