"""`verify` says what was compared and how, and fails naming the first difference."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.support.t5_folders import t5_folder
from tests.support.toy_pipeline import Flip, save

PLUGIN = """
    from pathlib import Path

    from pydantic import BaseModel

    from blockstream.plugins import Choice, hookimpl

    class Options(BaseModel):
        folder: str

    def build(options):
        from tests.support.toy_pipeline import ToyPipeline

        return ToyPipeline(Path(options.folder))

    @hookimpl
    def pipelines():
        return [Choice("toy", build, Options)]
"""


@pytest.fixture
def toy(site, tmp_path):
    """A config in the working folder, `toy.yaml`."""
    site.plugin("toy", PLUGIN)
    save(tmp_path / "weights")
    (tmp_path / "toy.yaml").write_text("pipeline: toy\nfolder: weights\narena: 100kB\nthreads: 1\n")


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(("more", "how"), [([], "whole"), (["--segments"], "segment by segment")])
def test_what_was_compared_and_how_is_printed(command, toy, more, how):
    code, out, err = command("verify", "toy.yaml", *more)
    assert (code, err) == (0, "")
    assert lines(out) == [
        ["stage", "weights", "forwards", "visits", "compared"],
        ["text", "4.9", "MiB", "1", "2", *how.split()],
        ["net", "115", "KiB", "3", "18", *how.split()],
        ["equal,", "bit", "for", "bit"],
    ]


def test_a_flipped_bit_is_exit_code_1_and_named(command, toy, monkeypatch):
    Flip(monkeypatch, "net", "blocks.3", "blocks.3.fc.weight")
    code, out, err = command("verify", "toy.yaml")
    assert (code, err) == (1, "")
    named = "stage 'net', segment 'blocks.3', call 1: parameter 'blocks.3.fc.weight'"
    assert out.splitlines()[-1].startswith(f"different: {named} differs by at most 0.1")


def test_a_difference_as_json(command, toy, monkeypatch):
    Flip(monkeypatch, "text", "blocks.0", "blocks.0.gain")
    code, out, _ = command("verify", "toy.yaml", "--segments", "--json", "--set", "threads=1")
    report = json.loads(out)
    assert (code, report["schema"], report["equal"]) == (1, 1, False)
    assert set(report["difference"]) == {"stage", "segment", "call", "what", "max_abs", "note"}
    assert (report["difference"]["stage"], report["difference"]["segment"]) == ("text", "blocks.0")
    assert report["difference"]["max_abs"] > 0
    assert [s["how"] for s in report["stages"]] == ["segments", "segments"]


@pytest.fixture
def pack(command, tmp_path):
    dst = tmp_path / "pack"
    assert command("pack", str(t5_folder(tmp_path / "t5")), str(dst))[0] == 0
    return dst


def test_the_hashes_of_a_pack_are_compared(command, pack):
    nbytes = sum(p.stat().st_size for p in pack.glob("*.safetensors"))
    assert command("verify", str(pack)) == (0, f"{pack}: {nbytes / 1024:.0f} KiB as packed\n", "")
    code, out, _ = command("verify", str(pack), "--json")
    assert (code, json.loads(out)) == (
        0,
        {"schema": 1, "equal": True, "pack": str(pack), "read_nbytes": nbytes},
    )


def test_a_bit_of_a_pack_that_changed_on_disk_is_found(command, pack):
    path = next(pack.glob("0002*"))
    with safe_open(path, "np") as file:
        assert list(file.keys())
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    code, out, err = command("verify", str(pack))
    assert (code, out) == (1, "")
    assert f"{path}: its contents have changed since it was packed" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pack", "--segments"], "--set and --segments are for configs"),
        (["pack", "--set", "a=1"], "--set and --segments are for configs"),
        (["t5"], "t5 is a folder and holds no finished pack; name a config or a pack"),
        (["nothing.yaml"], "nothing.yaml does not exist"),
    ],
)
def test_wrong_usage_is_exit_code_2(command, pack, monkeypatch, argv, message):
    monkeypatch.chdir(pack.parent)
    code, out, err = command("verify", *argv)
    assert (code, out, message in err) == (2, "", True), err


def test_subcommands_of_packages_stand_beside_the_built_in(command, toy, site):
    source = "def configure(parser): parser.add_argument('what')\ndef run(args): print(args.what)\n"
    site.install("exporter", {"exporter.py": source}, {"blockstream.commands": {"verify.toy": "exporter"}})
    assert command("verify", "toy", "model.mlpackage") == (0, "model.mlpackage\n", "")
    assert command("verify", "toy.yaml")[0] == 0
