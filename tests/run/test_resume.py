"""Going on with a run: its folder's numerics count, a finished one is left alone, a kill's litter goes."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ConfigDict, Field

from blockstream.errors import ConfigError
from blockstream.plugins.choices import Choice, Chosen
from blockstream.plugins.manager import Plugins
from blockstream.run.config import RunConfig
from blockstream.run.outputs import OutputFolder
from blockstream.run.resume import finished, keep_ledger, resumed


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


@pytest.fixture(name="begun")
def _begun(tmp_path):
    (tmp_path / "config.yaml").write_text(make().dump())
    return tmp_path


def test_the_config_of_the_beginning_is_resumed(begun):
    assert resumed(make(), begun).dump() == make().dump()


def test_automatic_threads_become_those_of_the_beginning(begun):
    assert resumed(make(threads="auto"), begun).threads == 1


def test_automatic_products_of_int8_become_those_of_the_beginning(begun):
    path = begun / "config.yaml"
    path.write_text(path.read_text().replace("int8: auto", "int8: fp32"))
    assert resumed(make(), begun).int8 == "fp32"
    with pytest.raises(ConfigError, match="int8 was 'fp32' and is 'bf16'"):
        resumed(make(int8="bf16"), begun)


@pytest.mark.parametrize(
    "free", [{"budget": "2GiB"}, {"arena": 5}, {"output": "x"}, {"plugins": ["lpl"]}, {"cache": "off"}]
)
def test_what_changes_no_bit_may_differ(begun, free):
    assert resumed(make(**free), begun).dump() == make(**free).dump()


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
def test_what_could_change_a_bit_is_refused_by_name(begun, changed, said):
    with pytest.raises(ConfigError, match=f"begun with another config: {said}"):
        resumed(make(**changed), begun)


def test_a_key_that_the_beginning_did_not_know_is_let_pass(begun):
    path = begun / "config.yaml"
    path.write_text(path.read_text().replace("scale: 0.1\n", ""))
    assert resumed(make(), begun).dump() == make().dump()


def test_a_folder_without_a_config_was_never_begun(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist: no run was begun there"):
        resumed(make(), tmp_path)


def test_only_a_run_whose_files_are_all_there_is_finished(tmp_path):
    assert finished(tmp_path) is None
    report = {"output": {"files": ["0000/video.mp4", "image.png"]}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / "video.mp4").touch()
    assert finished(tmp_path) is None
    (tmp_path / "image.png").touch()
    assert finished(tmp_path) == report
    for text in ("{", "[]", "{}", '{"output": {"files": []}}', '{"output": null}'):
        (tmp_path / "report.json").write_text(text)
        assert finished(tmp_path) is None


def test_ledgers_of_earlier_parts_are_kept_in_order(tmp_path):
    for n in range(3):
        (tmp_path / "ledger.jsonl").write_text(str(n))
        keep_ledger(tmp_path)
    keep_ledger(tmp_path)
    assert [(tmp_path / f"ledger.{n}.jsonl").read_text() for n in (1, 2, 3)] == ["0", "1", "2"]
    assert not (tmp_path / "ledger.jsonl").exists()


LITTER = [".video.mp4.part", "0001/.latents.safetensors.123", "state/.run.json.9", ".config.yaml.77"]
MINE = [".hidden", "notes/.draft.part", "0001/.keep", "video.part", ".env.local"]


def test_resuming_clears_what_a_kill_left_half_written_and_nothing_else(tmp_path):
    for name in (*LITTER, *MINE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with OutputFolder(tmp_path, resume=True):
        pass
    assert not any((tmp_path / name).exists() for name in LITTER)
    assert all((tmp_path / name).exists() for name in MINE)


def test_overwriting_removes_the_litter_too(tmp_path):
    for name in (*LITTER, "ledger.1.jsonl", "0001/video.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with OutputFolder(tmp_path, overwrite=True):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_fails_before_it_computes_leaves_nothing(tmp_path, begun):
    out = tmp_path / "new"
    folder = OutputFolder(out)
    with pytest.raises(RuntimeError), folder:
        for name in ("config.yaml", "ledger.jsonl"):
            (out / name).touch()
        folder.begun = begun
        raise RuntimeError
    assert out.exists() == begun


def test_a_folder_that_was_there_stays(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(tmp_path):
        (tmp_path / "config.yaml").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
