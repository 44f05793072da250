from __future__ import annotations

import errno
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.catalog import SYNTHETIC_NAME
from blockstream.checkpoint.read.torch_zip import read_records
from blockstream.checkpoint.write import synthesis as synth
from blockstream.checkpoint.write.safetensors_writer import TensorSpec
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.checkpoint.write.torch_zip_writer import state_dict_pickle, write_torch_zip
from blockstream.checkpoint.write.writer import FileWriter
from blockstream.errors import CheckpointError
from tests.support.checkpoint_files import cached_pages

SPEC = {
    "block.0.q.weight": ("F32", (256, 64)),
    "block.0.q.bias": ("F32", (256,)),
    "block.0.norm.weight": ("BF16", (64,)),
    "block.1.wi.weight": ("F16", (512, 64)),
    "block.1.scale": ("F64", (3, 3)),
    "conv.weight": ("F32", (8, 4, 3, 3)),
    "steps": ("I64", ()),
    "mask": ("BOOL", (5,)),
    "none": ("F32", (0, 4)),
}


def load(path) -> dict[str, torch.Tensor]:
    if path.suffix == ".bin":
        return torch.load(path, weights_only=True)
    return load_file(path)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("shard_nbytes", [None, 40_000])
def test_the_usual_libraries_read_what_is_written(tmp_path, layout, shard_nbytes):
    checkpoint = synthesise(SPEC, tmp_path / "s", layout, shard_nbytes, seed=1)
    files = {f.path for f in checkpoint.files}
    assert len(files) == (1 if shard_nbytes is None else 5)
    tensors = {n: t for path in files for n, t in load(path).items()}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    assert shapes == {n: shape for n, (_, shape) in SPEC.items()}
    for name, tensor in tensors.items():
        e = checkpoint[name]
        raw = e.file.path.read_bytes()[e.offset : e.end]
        assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_values_are_finite_and_scaled_by_what_they_are(tmp_path, layout):
    checkpoint = synthesise(SPEC, tmp_path / "s", layout)
    t = load(checkpoint.files[0].path)
    assert t["block.0.q.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert t["conv.weight"].std().item() == pytest.approx(36**-0.5, rel=0.2)
    assert t["block.0.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.05)
    assert t["block.0.q.bias"].abs().max().item() < 0.2
    assert t["steps"].item() == 0
    assert all(x.isfinite().all() for x in t.values())


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(tmp_path):
    paths = [synthesise(SPEC, tmp_path / str(i), seed=seed).files[0].path for i, seed in enumerate((5, 5, 6))]
    a, b, c = (p.read_bytes() for p in paths)
    assert a == b != c


def test_tensors_of_one_shape_differ_and_a_large_ones_rows_do(tmp_path):
    spec = dict.fromkeys(("a", "b"), ("F32", (2000, 4096)))
    checkpoint = synthesise(spec, tmp_path / "s")
    t = load_file(checkpoint.files[0].path)
    assert not torch.equal(t["a"], t["b"])
    assert len({row.numpy().tobytes() for row in t["a"]}) == 2000


def test_the_folder_is_marked_and_every_opening_says_so(tmp_path):
    synthesise({"w": ("F32", (2,))}, tmp_path / "s", seed=7, note={"architecture": "t5"})
    assert Checkpoint.open(tmp_path / "s").synthetic == {"seed": 7, "architecture": "t5"}
    marker = json.loads((tmp_path / "s" / SYNTHETIC_NAME).read_text())
    assert marker["architecture"] == "t5"


def test_writing_leaves_nothing_in_the_page_cache(tmp_path):
    checkpoint = synthesise({"w": ("F32", (4 << 20,))}, tmp_path / "s")
    assert cached_pages(checkpoint.files[0].path) <= 16  # opening it read the header


def test_a_folder_with_weights_is_not_written_to(tmp_path):
    synthesise({"w": ("F32", (2,))}, tmp_path / "s")
    before = (tmp_path / "s" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds weights already"):
        synthesise({"w": ("F32", (3,))}, tmp_path / "s")
    assert (tmp_path / "s" / "model.safetensors").read_bytes() == before


def test_a_folder_with_a_config_may_be_given_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert len(synthesise({"w": ("F32", (2,))}, tmp_path)) == 1


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, view, offset):
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(descriptor, view, offset)

    class Full(FileWriter):
        def __init__(self, path, **options):
            super().__init__(path, **{**options, "pwrite": full})

    monkeypatch.setattr(synth, "FileWriter", Full)
    with pytest.raises(CheckpointError, match="disk is full"):
        synthesise({"w": ("F32", (4 << 20,))}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_more_than_is_free_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"bytes are to be written and \d+ are free"):
        synthesise({"w": ("F32", (2**50,))}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("spec", [{}, {"w": ("F31", (2,))}])
def test_a_spec_of_nothing_or_of_unknown_dtypes_is_refused(tmp_path, spec):
    with pytest.raises(CheckpointError, match="cannot make"):
        synthesise(spec, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_torch_file_is_a_whole_zip_with_storages_aligned_as_torch_aligns_them(tmp_path):
    checkpoint = synthesise(SPEC, tmp_path / "s", "bin")
    path = checkpoint.files[0].path
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    records = read_records(path).records
    assert all(r.offset % 64 == 0 for n, r in records.items() if n.startswith("data/"))


def test_sizes_beyond_32_bits_are_pickled():
    shape = (3, 2**33)
    raw = state_dict_pickle([TensorSpec("w", "U8", shape)])
    assert (3 * 2**33).to_bytes(5, "little") in raw


class Short:
    """A pwrite that writes part of what it is given."""

    def __call__(self, descriptor, view, offset):
        return os.pwrite(descriptor, view[: max(512, len(view) // 3)], offset)


def test_short_writes_are_continued(tmp_path):
    content = np.random.default_rng(0).bytes(3 * 4096 + 77)
    with FileWriter(tmp_path / "x", hashed=True, pwrite=Short()) as writer:
        writer.write(content)
    assert (tmp_path / "x").read_bytes() == content


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), FileWriter(tmp_path / "x") as writer:
        writer.write(b"half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with FileWriter(tmp_path / "x") as writer:
        write_torch_zip(writer, [TensorSpec("w", "F32", (1,))], lambda t: [b"\0\0\x80\x3f"])
    assert torch.load(tmp_path / "x", weights_only=True)["w"].item() == 1.0


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        FileWriter(tmp_path / "none" / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        synthesise({"w": ("F32", (2,))}, tmp_path / "file" / "s")
