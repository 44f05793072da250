"""Which file of a folder is its checkpoint, where a name leads, and what is named for what it is."""

from __future__ import annotations

import argparse
import json
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.reader import Reader, Wanted, aligned_buffer
from blockstream.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}


def sharded(folder, index, suffix=".safetensors", missing=()):
    """Write two shards and an index of a name; the shards leave out what is `missing`."""
    folder.mkdir(exist_ok=True)
    places = {}
    for i, (name, value) in enumerate(STATE.items()):
        places[name] = f"w.x-{i + 1:05d}-of-00002{suffix}"
        held = {name: value} if name not in missing else {}
        save_file({**held, f"more{i}": torch.ones(1)}, folder / places[name])
        places[f"more{i}"] = places[name]
    (folder / index).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "index",
    [
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "model.safetensors.index.my-variant.json",
    ],
)
def test_an_index_of_any_variant_is_found(index, tmp_path):
    folder = sharded(tmp_path / "c", index)
    for path in (folder, folder / index):
        assert STATE.keys() <= Checkpoint.open(path).entries.keys()
    if "json" in index and "fp16" in index:
        assert STATE.keys() <= Checkpoint.open(folder, "fp16").entries.keys()


def test_a_variant_is_taken_by_its_name_and_the_plain_files_without(tmp_path):
    save_file({"plain": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"half": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert list(Checkpoint.open(tmp_path).entries) == ["plain"]
    assert list(Checkpoint.open(tmp_path, "fp16").entries) == ["half"]
    with pytest.raises(CheckpointError, match=r"nothing of variant 'bf16', but model\.fp16"):
        Checkpoint.open(tmp_path, "bf16")


def test_a_tensor_that_an_index_places_where_it_is_not_is_missed_when_it_is_wanted(tmp_path):
    index = "model.safetensors.index.json"
    opened = Checkpoint.open(sharded(tmp_path / "c", index, missing=["b.weight"]))
    assert "a.weight" in opened and "b.weight" not in opened
    with pytest.raises(CheckpointError, match=r"its index places 'b.weight' in w\.x-00002-of-00002"):
        opened["b.weight"]


WRAPPED = {
    "beside a tensor": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.2), "step": torch.tensor(1)},
    "beside an optimizer": lambda s: {"optimizer_state_dict": {"state": {0: s}}, "state_dict": s},
    "twice": lambda s: {"state_dict": {"model": s}},
    "under a key of one's own": lambda s: {"net_g": {"epoch_3": s}, "epoch": 3},
    "averaged": lambda s: {"params_ema": s, "params": {k: -v for k, v in s.items()}},
    "as parameters": lambda s: {k: nn.Parameter(v) for k, v in s.items()},
    "beside numbers of numpy": lambda s: {"state_dict": s, "best": np.float64(0.3), "n": np.int32(4)},
    "beside None and lists": lambda s: {"model": s, "scheduler": None, "log": [1, "x"]},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_state_dict_is_found_under_what_wraps_it(wrap, tmp_path):
    torch.save(wrap(STATE), tmp_path / "c.pt")
    opened = Checkpoint.open(tmp_path / "c.pt")
    assert opened.entries.keys() == STATE.keys()
    assert opened["a.weight"].shape == (2, 3)


class Local:
    """A class of the test's own."""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (Local(), r"\w+\.Local"),
        (np.array(["x"]), "numpy"),
    ],
)
def test_a_refused_pickle_names_the_class_without_terminal_codes(value, name, tmp_path):
    torch.save({"state_dict": STATE, "args": value}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=name) as caught:
        Checkpoint.open(tmp_path / "c.pt")
    assert "\x1b" not in str(caught.value)


def test_views_that_lie_over_each_other_many_times_are_refused(tmp_path):
    base = torch.zeros(2000)
    torch.save({f"w{i}": base[i : i + 1000] for i in range(1000)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"1000 tensors are overlapping views .* \.clone\(\)"):
        Checkpoint.open(tmp_path / "c.pt")


FOREIGN = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        r"Git LFS pointer.*git lfs pull",
    ),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    "page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights"])
@pytest.mark.parametrize(("content", "said"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_named_for_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path / name)


@pytest.mark.parametrize("content", [FOREIGN["lfs"], FOREIGN["page"]], ids=["lfs", "page"])
def test_an_index_that_is_of_another_kind_is_named_for_what_it_is(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(content[0])
    with pytest.raises(CheckpointError, match=content[1]):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("a.gguf", "GGUF"), ("a.dduf", "DDUF"), ("flax_model.msgpack", "flax")]
)
def test_a_folder_of_another_format_is_named_for_it(name, said, tmp_path):
    (tmp_path / name).write_bytes(bytes(100))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=said):
            Checkpoint.open(path)


def test_a_link_to_nowhere_is_named_with_its_target(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/1234")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"link to \S*blobs/1234, which is not there"):
            Checkpoint.open(path)
    folder = sharded(tmp_path / "c", "model.safetensors.index.json")
    shard = folder / "w.x-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("../blobs/5678")
    with pytest.raises(CheckpointError, match=r"link to \S*blobs/5678"):
        Checkpoint.open(folder)


def test_a_hubs_name_leads_to_the_local_cache_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"nor a model .* local cache .*hub.* `hf download some/model`"):
        Checkpoint.open("some/model")
    model = tmp_path / "hub" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    save_file(STATE, model / "snapshots" / "abc" / "model.safetensors")
    assert Checkpoint.open("some/model").entries.keys() == STATE.keys()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoint.open("~/hub/models--some--model/snapshots/abc").entries.keys() == STATE.keys()


def test_many_files_are_read_with_few_of_them_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [tmp_path / f"{i}" for i in range(100)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 4096)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, len(os.listdir("/dev/fd")) + 24), hard))
        with Reader() as reader:
            files = [reader.open(path) for path in paths]
            for _ in range(2):
                rooms = [aligned_buffer(4096) for _ in files]
                reader.read([Wanted(f, 0, 4096, room) for f, room in zip(files, rooms, strict=True)])
                assert [room[0] for room in rooms] == list(range(100))
            paths[0].rename(tmp_path / "old")
            paths[0].write_bytes(bytes(4096))
            assert files[0].park()
            with pytest.raises(CheckpointError, match="it was replaced"):
                reader.read([Wanted(files[0], 0, 4096, rooms[0])])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
