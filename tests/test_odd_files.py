"""A FIFO, a socket or a device in place of a file that a user or a file names is refused at once.

Each door is tried with each kind; one that opened it would wait, and the test's time limit would end it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.packer import pack, verify_pack
from blockstream.cli.main import main
from blockstream.errors import BlockstreamError
from blockstream.run.config import make_config, read_config
from blockstream.run.files import Files
from blockstream.run.journal import Journal
from blockstream.sweep.place import Place
from blockstream.sweep.tasks import read_prompts
from blockstream.system import cache, calibration
from movd.reference import read_reference
from movd.texts import TextCache
from movd.weights import Weights
from tests.support.checkpoint_files import write

FIRST = "model-00001-of-00002.safetensors"
SEGMENTS = {"a": ("t0",), "b": ("t1",)}


def sharded(folder):
    folder.mkdir()
    shards = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, shard in enumerate(shards):
        write(folder / shard, {f"t{i}": np.ones(8, np.float32)})
    table = {f"t{i}": shard for i, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def model(tmp_path):
    """Return a folder with the embedded model, fit to be spoilt."""
    assets = Path(__file__).parent.parent / "movd" / "assets" / "tiny"
    return Path(shutil.copytree(assets, tmp_path / "tiny"))


def weights(folder):
    sets = [f"{part}.path={folder / part}" for part in ("t5", "dit", "vae")]
    return Weights(make_config(read_config("movd.yaml", sets)).pipeline.options)


def run_command(*words):
    code = main([*words])
    assert code in (1, 2)
    raise BlockstreamError("is told by the exit code and on stderr")


#: Door: (what makes the files, which of them is spoilt, what opens it).
CHECKPOINTS = {
    "checkpoint": ("model.safetensors", Checkpoint.open),
    "checkpoint found in a folder": ("model.safetensors", lambda path: Checkpoint.open(path.parent)),
    "torch file": ("pytorch_model.bin", Checkpoint.open),
    "file of no known name": ("weights.dat", Checkpoint.open),
    "shard": ("model-00002-of-00002.safetensors", lambda path: Checkpoint.open(path.parent)),
    "index": ("model.safetensors.index.json", lambda path: Checkpoint.open(path.parent)),
    "index by name": ("model.safetensors.index.json", Checkpoint.open),
    "manifest": ("blockstream.json", lambda path: Checkpoint.open(path.parent)),
    "marker": ("synthetic.json", lambda path: Checkpoint.open(path.parent)),
    "journal": ("blockstream.unfinished.json", lambda path: pack(path.parent / FIRST, path.parent, {})),
}


@pytest.mark.parametrize("door", CHECKPOINTS)
def test_of_a_checkpoint(odd_file, tmp_path, door):
    make, said = odd_file
    name, use = CHECKPOINTS[door]
    folder = sharded(tmp_path / "source")
    if name == "model.safetensors":
        (folder / "model.safetensors.index.json").unlink()
    path = make(folder / name)
    with pytest.raises(BlockstreamError, match=f"{name}.*{said}"):
        use(path)


@pytest.mark.parametrize("use", [Checkpoint.open, verify_pack], ids=["open", "verify"])
def test_of_a_packs_segment(odd_file, tmp_path, use):
    make, said = odd_file
    manifest = pack(sharded(tmp_path / "source"), tmp_path / "pack", SEGMENTS)
    make(tmp_path / "pack" / manifest.segments[1].file)
    with pytest.raises(BlockstreamError, match=said):
        use(tmp_path / "pack")


def test_of_a_checkpoint_that_was_opened_when_it_was_a_file(odd_file, tmp_path):
    make, said = odd_file
    opened = Checkpoint.open(sharded(tmp_path / "source"))
    make(opened.files[0].path)
    with pytest.raises(BlockstreamError, match=said):
        opened.files[0].check()
    with pytest.raises(BlockstreamError, match=said):
        pack(opened, tmp_path / "pack", SEGMENTS)


@pytest.mark.parametrize("key", ["prompts", "reference", "config"])
def test_of_a_config(odd_file, tmp_path, key):
    make, said = odd_file
    path = make(tmp_path / "x")
    with pytest.raises(BlockstreamError, match=f"x.*{said}"):
        if key == "config":
            make_config(read_config(str(path), []))
        config = make_config(read_config("movd.yaml", [f"{key}={path}"]))
        read_reference(Path(config.pipeline.options.reference), 16, 16)


def test_of_a_sweeps_prompts_and_its_record(odd_file, tmp_path):
    make, said = odd_file
    path = make(tmp_path / "x")
    with pytest.raises(BlockstreamError, match=f"x.*{said}"):
        read_prompts(str(path))
    with pytest.raises(OSError, match=said):
        Place(str(tmp_path)).read("x")


@pytest.mark.parametrize(
    "name", ["t5/config.json", "dit/config.json", "vae/config.json", "t5/tokenizer.json"]
)
def test_of_a_models_small_files(odd_file, tmp_path, name):
    from movd.tokenizer import load_tokenizer

    make, said = odd_file
    folder = model(tmp_path)
    make(folder / name)
    with pytest.raises(BlockstreamError, match=f"{name}.*{said}"):
        weights(folder)
        load_tokenizer(folder / "t5")


def test_what_is_only_kept_for_speed_is_done_without(odd_file, tmp_path):
    make, _ = odd_file
    about = {"fact": "x"}
    calibration.write(about, {"a": 1.0}, tmp_path)
    (kept,) = (tmp_path / "calibration").iterdir()
    make(kept)
    assert calibration.read(about, tmp_path) == {}
    texts = TextCache(tmp_path / "texts", 1 << 20)
    texts.put("key", {"y": torch.zeros(4, 2)})
    make(texts.path("key"))
    assert texts.get("key") is None
    texts.put("key", {"y": torch.zeros(4, 2)})  # takes its place
    assert texts.get("key") is not None
    files = Files(tmp_path / "run", resumed=True)
    files.folder.mkdir()
    files.begin({}, {})
    files.declare(["made.json"])
    files.write("made.json", b"{}")
    make(files.folder / "made.json")
    assert not Files(files.folder, Journal.read(files.folder), resumed=True).is_whole("made.json")
    make(tmp_path / "floor.json")
    assert cache.cached(tmp_path / "floor.json") is None


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "{}"],
        ["run", "{}"],
        ["plan", "{}"],
        ["schema", "{}"],
        ["verify", "{}"],
        ["pack", "{}", "elsewhere"],
        ["synth", "{}", "elsewhere"],
    ],
    ids=lambda words: words[0],
)
def test_of_a_command(odd_file, tmp_path, words, capsys, monkeypatch):
    make, said = odd_file
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "x")
    assert main([word.format(path) for word in words]) in (1, 2)
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("x", "linked")] == []


@pytest.mark.parametrize("name", ["ledger.jsonl", "report.json", "config.yaml"])
def test_of_a_run_that_is_drawn_again(odd_file, tmp_path, name, capsys):
    make, said = odd_file
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.jsonl").write_text('{"schema": 1, "began": 1.0}\n')
    make(run / name)
    code = main(["report", str(run), "--no-draw"])
    told = capsys.readouterr()
    assert code == 0 or (f"{name} " in told.err and said in told.err)
