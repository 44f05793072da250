from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.catalog import SYNTHETIC_NAME
from blockstream.checkpoint.read.manifest import JOURNAL_NAME, MANIFEST_NAME
from blockstream.checkpoint.read.placement import BLOCK, lay_out
from blockstream.checkpoint.read.requests import Request
from blockstream.checkpoint.read.safetensors_header import read_header
from blockstream.checkpoint.write import packer as module
from blockstream.checkpoint.write.packer import pack, verify_pack
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.errors import CheckpointError
from tests.support.checkpoint_files import arrays, bound, cached_pages, load, store_of, write

SEGMENTS = {"block.0": ("t0", "t1"), "block/1: odd name": ("t2", "t3")}


@pytest.fixture
def tensors():
    return {**arrays((64, 32), (32,), (64, 32), (5,), (3, 7)), "i": np.arange(6)}


@pytest.fixture
def source(tmp_path, tensors):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "model.safetensors", tensors, 40)
    return tmp_path / "source"


def test_a_pack_is_safetensors_files_and_a_checkpoint_with_the_same_tensors(tmp_path, source, tensors):
    dst = tmp_path / "pack"
    heard = []
    manifest = pack(source, dst, SEGMENTS, on_segment=lambda *args: heard.append(args))
    assert [s.name for s in manifest.segments] == ["block.0", "block/1: odd name", "rest"]
    assert heard == [(s.name, i + 1, 3) for i, s in enumerate(manifest.segments)]
    files = {s.name: load_file(dst / s.file) for s in manifest.segments}
    assert {n: set(f) for n, f in files.items()} == {
        "block.0": {"t0", "t1"},
        "block/1: odd name": {"t2", "t3"},
        "rest": {"t4", "i"},
    }
    checkpoint = Checkpoint.open(dst)
    assert checkpoint.form == "packed"
    assert set(checkpoint.entries) == set(tensors)
    for found in files.values():
        for name, array in found.items():
            assert array.tobytes() == tensors[name].tobytes()
    assert verify_pack(dst) == sum(s.nbytes for s in manifest.segments)


def test_every_file_begins_its_data_on_a_block_and_needs_no_moves(tmp_path, source):
    dst = tmp_path / "pack"
    manifest = pack(source, dst, {"all": ("t0", "t1", "t2", "t3")})
    assert all(read_header(dst / s.file).data_start % BLOCK == 0 for s in manifest.segments)
    checkpoint = Checkpoint.open(dst)
    layout = lay_out("all", [Request(n, (checkpoint[n],)) for n in ("t0", "t1", "t2", "t3")])
    assert (len(layout.reads), layout.moves) == (1, ())


@pytest.mark.parametrize(
    ("dtype", "want"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_floating_point_tensors_are_converted_and_others_kept(tmp_path, source, tensors, dtype, want):
    from safetensors.torch import load_file as load_torch

    manifest = pack(source, tmp_path / "pack", SEGMENTS, dtype)
    for segment in manifest.segments:
        for name, tensor in load_torch(tmp_path / "pack" / segment.file).items():
            plain = torch.from_numpy(tensors[name])
            assert torch.equal(tensor, plain.to(want) if plain.is_floating_point() else plain)


def test_a_torch_checkpoint_is_packed_and_ties_are_kept_once(tmp_path):
    w = torch.randn(16, 16)
    (tmp_path / "source").mkdir()
    torch.save({"a": w, "b": w, "c": torch.ones(3)}, tmp_path / "source" / "pytorch_model.bin")
    pack(tmp_path / "source", tmp_path / "pack", {"s": ("a", "b", "c")})
    checkpoint = Checkpoint.open(tmp_path / "pack")
    assert checkpoint["a"] == checkpoint["b"]
    layout = lay_out("s", [Request(n, (checkpoint[n],)) for n in ("a", "b", "c")])
    store, room = store_of(layout)
    got = bound(store, load(store, "m", "s", room))
    store.close()
    assert got["a"].tobytes() == got["b"].tobytes() == w.numpy().tobytes()


def test_packing_leaves_nothing_in_the_page_cache(tmp_path, source):
    manifest = pack(source, tmp_path / "pack", SEGMENTS)
    for segment in manifest.segments:
        path = tmp_path / "pack" / segment.file
        # reading the header back is what may have cached a page or two
        assert cached_pages(path) <= 8


def test_packing_again_does_nothing_and_packing_something_else_is_refused(tmp_path, source):
    dst = tmp_path / "pack"
    first = pack(source, dst, SEGMENTS)
    times = {p.name: p.stat().st_mtime_ns for p in dst.iterdir()}
    assert pack(source, dst, SEGMENTS) == first
    assert {p.name: p.stat().st_mtime_ns for p in dst.iterdir()} == times
    with pytest.raises(CheckpointError, match="finished pack of something else"):
        pack(source, dst, SEGMENTS, "bf16")


KILLED = """
import os, signal, sys
from blockstream.checkpoint.write.packer import pack
def pwrite(descriptor, view, offset, calls=[0]):
    calls[0] += 1
    if calls[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return os.pwrite(descriptor, view, offset)
pack(sys.argv[1], sys.argv[2], {"a": ("t0",), "b": ("t1",), "c": ("t2",)}, pwrite=pwrite)
"""


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_pack_that_was_killed_is_no_checkpoint_and_goes_on(tmp_path, source, tensors, at):
    dst = tmp_path / "pack"
    command = [sys.executable, "-c", KILLED, str(source), str(dst), str(at)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="pack that was not finished"):
        Checkpoint.open(dst)
    heard = []
    segments = {"a": ("t0",), "b": ("t1",), "c": ("t2",)}
    pack(source, dst, segments, on_segment=lambda name, *_: heard.append(name))
    assert heard == ["a", "b", "c", "rest"][at - 1 :]  # what was finished is not written again
    verify_pack(dst)
    checkpoint = Checkpoint.open(dst)
    assert set(checkpoint.entries) == set(tensors)
    assert not [p for p in dst.iterdir() if "unfinished" in p.name]


def full(after):
    """Return a pwrite on a disk with room for some calls."""
    calls = iter(range(10**6))

    def pwrite(descriptor, view, offset):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(descriptor, view, offset)

    return pwrite


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_finished_files_only_and_packing_goes_on(tmp_path, source, after):
    dst = tmp_path / "pack"
    with pytest.raises(CheckpointError, match=r"disk is full.*again"):
        pack(source, dst, SEGMENTS, pwrite=full(after))
    left = {p.name for p in dst.iterdir()}
    assert len(left) == 1 + after
    assert JOURNAL_NAME in left
    assert not any(n.endswith(".unfinished") for n in left)
    pack(source, dst, SEGMENTS)
    verify_pack(dst)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, source, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"\d+ bytes are to be written and 100 are free"):
        pack(source, tmp_path / "pack", SEGMENTS)


def touch(path):
    os.utime(path, ns=(1, 1))


def grow(path):
    with path.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize(("change", "said"), [(touch, "modification time"), (grow, "its size")])
def test_a_pack_whose_source_changed_is_stale(tmp_path, source, change, said):
    dst = tmp_path / "pack"
    pack(source, dst, SEGMENTS)
    change(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is stale.*{said}.*pack the source again"):
        Checkpoint.open(dst)


def test_a_pack_outlives_its_source(tmp_path, source, tensors):
    pack(source, tmp_path / "pack", SEGMENTS)
    (source / "model.safetensors").unlink()
    (tmp_path / "pack").rename(tmp_path / "elsewhere")
    assert set(Checkpoint.open(tmp_path / "elsewhere").entries) == set(tensors)


def test_a_source_that_changes_while_packing_makes_no_pack(tmp_path, source):
    dst = tmp_path / "pack"
    with pytest.raises(CheckpointError, match="has changed since"):
        pack(source, dst, SEGMENTS, on_segment=lambda *_: touch(source / "model.safetensors"))
    assert not (dst / MANIFEST_NAME).exists()


def test_an_unfinished_pack_of_something_else_is_not_continued(tmp_path, source):
    dst = tmp_path / "pack"
    with pytest.raises(CheckpointError, match="disk is full"):
        pack(source, dst, SEGMENTS, pwrite=full(1))
    with pytest.raises(CheckpointError, match="unfinished pack of another"):
        pack(source, dst, SEGMENTS, "fp16")


def test_a_folder_that_holds_something_else_is_refused(tmp_path, source):
    dst = tmp_path / "pack"
    dst.mkdir()
    (dst / "thesis.tex").write_text("\\end{document}")
    with pytest.raises(CheckpointError, match=r"not empty \(thesis\.tex\)"):
        pack(source, dst, SEGMENTS)
    assert [p.name for p in dst.iterdir()] == ["thesis.tex"]


def test_two_packers_of_one_folder_are_kept_apart(tmp_path, source):
    dst = tmp_path / "pack"
    second = []

    def again(*_):
        with pytest.raises(CheckpointError, match="another process is writing to it"):
            pack(source, dst, SEGMENTS)
        second.append(True)

    pack(source, dst, SEGMENTS, on_segment=again)
    assert second


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_verifying(tmp_path, source):
    dst = tmp_path / "pack"
    manifest = pack(source, dst, SEGMENTS)
    corrupt(dst / manifest.segments[1].file)
    with pytest.raises(CheckpointError, match="contents have changed since it was packed"):
        verify_pack(dst)


def test_a_file_of_another_pack_is_foreign(tmp_path, source):
    first, second = tmp_path / "a", tmp_path / "b"
    manifest = pack(source, first, SEGMENTS)
    pack(source, second, SEGMENTS, "bf16")
    name = manifest.segments[0].file
    (first / name).write_bytes((second / name).read_bytes())
    with pytest.raises(CheckpointError, match="is not the file the manifest describes"):
        Checkpoint.open(first)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "a/../../b"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(tmp_path, source, name):
    dst = tmp_path / "pack"
    pack(source, dst, SEGMENTS)
    value = json.loads((dst / MANIFEST_NAME).read_text())
    value["segments"][0]["file"] = name
    (dst / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="only files inside its own folder"):
        Checkpoint.open(dst)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "is not JSON"),
        ("[]", "no manifest"),
        ('{"format": "other"}', "no manifest"),
        ('{"format": "blockstream-pack", "version": 2}', "version 2"),
        ('{"format": "blockstream-pack", "version": 1, "request": 3}', "request.*damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, text, said):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ({"a": ("t0", "nothing")}, "no tensor 'nothing'"),
        ({"a": ("t0",), "b": ("t0",)}, "'t0' is in two segments"),
        ({"rest": ("t0",)}, "'rest' is named twice"),
    ],
)
def test_segments_that_do_not_fit_the_checkpoint_are_refused(tmp_path, source, segments, said):
    with pytest.raises(CheckpointError, match=said):
        pack(source, tmp_path / "pack", segments)
    with pytest.raises(CheckpointError, match="no dtype 'int3'"):
        pack(source, tmp_path / "pack", SEGMENTS, "int3")
    assert not (tmp_path / "pack").exists()


def test_a_pack_of_a_synthetic_checkpoint_is_synthetic(tmp_path):
    source = synthesise({"w": ("F32", (4, 4))}, tmp_path / "source", seed=3)
    pack(source, tmp_path / "pack", {"s": ("w",)})
    assert (tmp_path / "pack" / SYNTHETIC_NAME).exists()
    assert Checkpoint.open(tmp_path / "pack").synthetic == {"seed": 3}
