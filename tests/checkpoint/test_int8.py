"""Matrices rounded to int8: how far off they are, how a pack holds them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.manifest import MANIFEST_NAME
from blockstream.checkpoint.write import packer as module
from blockstream.checkpoint.write.packer import pack, verify_pack
from blockstream.checkpoint.write.rounding import Rounder
from blockstream.errors import CheckpointError
from tests.support.checkpoint_files import arrays, write


def rounded(w: np.ndarray, rows: int = 3) -> tuple[np.ndarray, Rounder]:
    """Return a float32 matrix in int8, given in pieces of some rows."""
    rounder = Rounder("w", "F32", w.shape)
    pieces = [bytes(rounder.round(memoryview(w[i : i + rows].tobytes()))) for i in range(0, len(w), rows)]
    return np.frombuffer(b"".join(pieces), np.int8).reshape(w.shape), rounder


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    power=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(rows, columns, power, seed):
    w = (np.random.default_rng(seed).standard_normal((rows, columns)) * 10.0**power).astype(np.float32)
    q, rounder = rounded(w)
    scales = rounder.scales.astype(np.float64)
    np.testing.assert_allclose(scales * 127, np.abs(w).max(1), rtol=1e-6)
    apart = np.abs(w.astype(np.float64) - scales[:, None] * q)
    assert (apart <= scales[:, None] * (0.5 + 1e-4)).all()
    assert (np.abs(q).max(1) == 127).all()


def test_the_error_is_that_of_all_rows():
    w = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    q, rounder = rounded(w)
    apart = w - rounder.scales[:, None] * q
    error = rounder.error
    assert error.worst == pytest.approx(np.abs(apart).max() / np.abs(w).max(), rel=1e-4)
    assert error.rms == pytest.approx(np.sqrt((apart**2).mean() / (w**2).mean()), rel=1e-4)


def test_rows_of_zeros_and_of_the_smallest_numbers_round_to_something_finite():
    w = np.zeros((3, 4), np.float32)
    w[1, 2] = -1e-44
    w[2] = [3e38, -3e38, 1e38, 0]
    q, rounder = rounded(w)
    assert not q[0].any()
    assert q[2].tolist() == [127, -127, 42, 0]
    assert np.isfinite(rounder.scales).all()
    assert np.abs(w - rounder.scales[:, None] * q)[1].max() <= 1e-44


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_its_row(value):
    w = np.ones((8, 4), np.float32)
    w[5, 1] = value
    with pytest.raises(CheckpointError, match="'w': row 5 holds a value that is not finite"):
        rounded(w)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "model.safetensors", arrays((64, 32), (32,), (5, 7), (16, 4), (3, 3)), 40)
    return tmp_path / "source"


SEGMENTS = {"block.0": ("t0", "t1"), "block.1": ("t2", "t3")}


def test_a_pack_holds_the_matrices_and_their_scales_in_files_any_library_reads(tmp_path, source):
    manifest = pack(source, tmp_path / "pack", SEGMENTS, "int8", int8=("t0", "t2"))
    given = load_file(source / "model.safetensors")
    first, second, rest = (load_file(tmp_path / "pack" / s.file) for s in manifest.segments)
    assert set(first) == {"t0", "t0_scale", "t1"}
    assert set(second) == {"t2", "t2_scale", "t3"}
    assert rest["t4"].tobytes() == given["t4"].tobytes()
    assert first["t1"].tobytes() == given["t1"].tobytes()
    for name, found in (
        ("t0", first),
        ("t2", second),
    ):  # t2's scale comes before it: sizes that are not aligned
        q, rounder = rounded(given[name])
        assert (found[name].dtype, found[name].tobytes()) == (np.int8, q.tobytes())
        assert found[f"{name}_scale"].tobytes() == rounder.scales.tobytes()
    assert [e.name for s in manifest.segments for e in s.int8] == ["t0", "t2"]
    assert manifest.segments[0].int8[0].rms == pytest.approx(rounded(given["t0"])[1].error.rms)
    assert verify_pack(tmp_path / "pack") == sum(s.nbytes for s in manifest.segments)
    assert Checkpoint.open(tmp_path / "pack").scales == {"t0_scale", "t2_scale"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_rounded_from_what_they_are(tmp_path, dtype):
    w = torch.randn(12, 16).to(dtype)
    save_torch({"w": w}, tmp_path / "model.safetensors")
    manifest = pack(tmp_path / "model.safetensors", tmp_path / "pack", {"s": ("w",)}, "int8", int8=("w",))
    found = load_torch(tmp_path / "pack" / manifest.segments[0].file)
    q, rounder = rounded(w.float().numpy())
    assert found["w"].numpy().tobytes() == q.tobytes()
    assert found["w_scale"].numpy().tobytes() == rounder.scales.tobytes()


def test_matrices_larger_than_a_step_of_reading_are_the_same(tmp_path, source, monkeypatch):
    whole = pack(source, tmp_path / "a", SEGMENTS, "int8", int8=("t0", "t2"))
    monkeypatch.setattr(module, "STEP_NBYTES", 300)  # two rows of t0, and more than one of t2
    parts = pack(source, tmp_path / "b", SEGMENTS, "int8", int8=("t0", "t2"))
    assert [s.sha256 for s in parts.segments] == [s.sha256 for s in whole.segments]
    monkeypatch.setattr(module, "STEP_NBYTES", 100)  # less than a row of t0
    rows = pack(source, tmp_path / "c", SEGMENTS, "int8", int8=("t0", "t2"))
    assert [s.sha256 for s in rows.segments] == [s.sha256 for s in whole.segments]


def test_a_pack_that_goes_on_keeps_the_errors_of_what_was_done(tmp_path, source):
    def stop(name, done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "pack", SEGMENTS, "int8", int8=("t0", "t2"), on_segment=stop)
    manifest = pack(source, tmp_path / "pack", SEGMENTS, "int8", int8=("t0", "t2"))
    assert [e.name for s in manifest.segments for e in s.int8] == ["t0", "t2"]
    with pytest.raises(CheckpointError, match="finished pack of something else"):
        pack(source, tmp_path / "pack", SEGMENTS, "int8", int8=("t0",))


def test_the_manifest_of_an_older_pack_is_still_read(tmp_path, source):
    pack(source, tmp_path / "pack", SEGMENTS)
    path = tmp_path / "pack" / MANIFEST_NAME
    older = json.loads(path.read_text())
    del older["request"]["int8"]
    for segment in older["segments"]:
        del segment["int8"]
    path.write_text(json.dumps(older))
    assert len(Checkpoint.open(tmp_path / "pack")) == 5


@pytest.mark.parametrize(
    ("extra", "name", "message"),
    [
        ({}, "t1", r"'t1' is F32 \[32\]; only matrices of BF16, F16, F32 are rounded"),
        ({"i": np.ones((2, 2), np.int64)}, "i", r"'i' is I64 \[2, 2\]; only matrices"),
        ({"t0_scale": np.ones(2, np.float32)}, "t0", "holds 't0_scale' already"),
        ({}, "none", "has no tensor 'none'"),
    ],
)
def test_what_cannot_be_rounded_is_refused_before_anything_is_written(tmp_path, source, extra, name, message):
    path = source / "model.safetensors"
    write(path, {**arrays((64, 32), (32,)), **extra})
    with pytest.raises(CheckpointError, match=message):
        pack(source, tmp_path / "pack", {}, "int8", int8=(name,))
    assert not (tmp_path / "pack").exists()
