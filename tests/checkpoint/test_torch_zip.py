from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockstream.module.torch_pickle as torch_side
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.torch_zip import read_records, scan
from blockstream.errors import CheckpointError
from tests.support.mutations import check_torch_zip, damaged_torch_zip, torch_zip

BIG = torch.arange(4096, dtype=torch.float32).reshape(64, 64)
STATE = OrderedDict(
    a=torch.randn(100, 30),
    half=torch.randn(5).half(),
    brain=torch.randn(3, 3).bfloat16(),
    rows=BIG[3:5],
    number=torch.tensor(3),
    empty=torch.zeros(0, 4),
    parameter=torch.nn.Parameter(torch.randn(2)),
)


def saved(tmp_path, value, **options):
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


def assert_equal_in_place(path, checkpoint, state):
    content = path.read_bytes()
    for name, tensor in state.items():
        e = checkpoint[name]
        assert e.shape == tuple(tensor.shape)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[e.offset : e.end] == raw


def test_the_bytes_of_every_tensor_are_found_in_place(tmp_path):
    path = saved(tmp_path, STATE)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.form == "torch"
    assert set(checkpoint.entries) == set(STATE)
    assert_equal_in_place(path, checkpoint, STATE)
    dtypes = [checkpoint[n].dtype for n in ("a", "half", "brain", "number")]
    assert dtypes == ["F32", "F16", "BF16", "I64"]


def test_a_torch_that_notes_offsets_for_fake_tensors_only_finds_the_same(tmp_path, monkeypatch):
    path = saved(tmp_path, STATE)
    plain = Checkpoint.open(path)
    monkeypatch.setattr(torch_side, "notes_offsets_on_meta", lambda: False)
    assert Checkpoint.open(path).entries == plain.entries


def test_tied_tensors_share_their_bytes(tmp_path):
    w = torch.randn(4, 4)
    checkpoint = Checkpoint.open(saved(tmp_path, {"a": w, "b": w, "part": w[1]}))
    a, b, part = (checkpoint[n] for n in ("a", "b", "part"))
    assert (a.offset, a.nbytes) == (b.offset, b.nbytes)
    assert part.offset == a.offset + 16
    assert checkpoint.nbytes == 64 + 16


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_state_dict_is_found_inside_a_training_checkpoint(tmp_path, key):
    path = saved(tmp_path, {"epoch": 3, key: {"w": torch.ones(2)}, "optimizer": {}})
    assert set(Checkpoint.open(path).entries) == {"w"}


def test_an_archive_named_in_another_alphabet_is_read(tmp_path):
    path = tmp_path / "модель.pt"
    torch.save({"w": torch.ones(2)}, path)
    assert_equal_in_place(path, Checkpoint.open(path), {"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (BIG.t(), "contiguous"),
        (BIG[:, 3], "contiguous"),
        (torch.eye(3).to_sparse(), "plain"),
    ],
)
def test_a_tensor_that_is_not_plain_is_refused_by_name(tmp_path, tensor, what):
    with pytest.raises(CheckpointError, match=f"'odd'.*{what}"):
        Checkpoint.open(saved(tmp_path, {"odd": tensor}))


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.ones(3), {3: torch.ones(1)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="no table of names and tensors"):
        Checkpoint.open(saved(tmp_path, value))


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1), "trap": Trap()})
    with pytest.raises(CheckpointError, match="refuses to read it as weights only"):
        Checkpoint.open(path)
    assert not Trap.opened


def test_the_old_pickle_format_is_refused_with_the_remedy(tmp_path):
    path = saved(tmp_path, STATE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"plain pickle.*torch\.save"):
        Checkpoint.open(path)


def test_the_old_tar_format_and_other_files_are_refused(tmp_path):
    tar = tmp_path / "old.bin"
    tar.write_bytes(bytes(257) + b"ustar\0" + bytes(512))
    with pytest.raises(CheckpointError, match="a tar file"):
        read_records(tar)
    other = tmp_path / "other.bin"
    other.write_bytes(b"GGUF and so on")
    with pytest.raises(CheckpointError, match="begins with b'GGUF"):
        read_records(other)


def members(path, **options):
    """Return the members of a torch file, to write again with something changed."""
    with zipfile.ZipFile(path) as archive:
        return {m.filename: archive.read(m) for m in archive.infolist()}


def rewritten(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def test_compressed_records_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1000)})
    rewritten(path, members(path), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read_records(path)


def test_encrypted_records_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1)})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is encrypted"):
        read_records(path)


def test_big_endian_numbers_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1)})
    contents = {n: b"big" if n.endswith("byteorder") else c for n, c in members(path).items()}
    with pytest.raises(CheckpointError, match="b'big'-endian"):
        read_records(rewritten(path, contents))


def test_a_zip_file_torch_did_not_write_is_refused(tmp_path):
    path = rewritten(tmp_path / "x.bin", {"readme": b"hello", "b/c": b""})
    with pytest.raises(CheckpointError, match=r"without one folder that holds data\.pkl"):
        read_records(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = saved(tmp_path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="truncated"):
        read_records(path)


def test_records_that_overlap_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(100), "b": torch.zeros(100)})
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    while not content[at + 46 :].startswith(b"pytorch_model/data/0"):
        at = content.index(b"PK\x01\x02", at + 1)
    for field in (20, 24):  # both sizes of data/0 now reach into data/1
        content[at + field : at + field + 4] = (900).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"after .* begins at"):
        read_records(path)


def test_records_past_four_gibibytes_are_found(tmp_path):
    path = tmp_path / "big.bin"  # sparse: the hole takes no disk
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        stream.flush()
        stream.seek((5 << 30) - 100)
        archive.start_dir = stream.tell()
        archive.writestr("a/data/0", b"far away")
    record = read_records(path).records["data/0"]
    assert record.offset > 4 << 30
    with path.open("rb") as stream:
        stream.seek(record.offset)
        assert stream.read(record.nbytes) == b"far away"


def test_nothing_of_the_tensors_is_read(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1 << 20)})
    content = bytearray(path.read_bytes())
    at = content.index(torch.ones(64).numpy().tobytes())
    content[at : at + (4 << 20)] = b"\xff" * (4 << 20)
    path.write_bytes(content)
    assert Checkpoint.open(path)["a"].offset == at


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_the_scanner_raise_anything_else(content):
    check_torch_zip(content)
    check_torch_zip(b"PK\x03\x04" + content)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_a_damaged_archive_is_refused_or_its_records_are_bytes_of_the_file(seed):
    check_torch_zip(damaged_torch_zip(seed))


def test_the_fuzzers_undamaged_archive_is_accepted():
    content = torch_zip(3)
    records, _ = scan(io.BytesIO(content), len(content), Path("x"))
    assert {n for n in records if n.startswith("data/")} == {"data/0", "data/1", "data/2"}
