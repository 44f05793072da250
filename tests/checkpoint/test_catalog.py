from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError
from tests.support.checkpoint_files import arrays, write


def sharded(folder, names=("model-1.safetensors", "model-2.safetensors")):
    """Write two shards and their index; return the arrays."""
    first, second = arrays((3, 4), (5,)), {"u": arrays((6,), seed=1)["t0"]}
    for name, tensors in zip(names, (first, second), strict=True):
        write(folder / name, tensors)
    index = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return first | second


def test_a_folder_with_one_file_is_opened_by_the_folder_or_the_file(tmp_path):
    path = write(tmp_path / "model.safetensors", arrays((2,)))
    for where in (tmp_path, path, str(path)):
        checkpoint = Checkpoint.open(where)
        assert (checkpoint.form, len(checkpoint), "t0" in checkpoint) == ("safetensors", 1, True)
        assert checkpoint.synthetic is None


@pytest.mark.parametrize("name", ["weights.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_file_of_any_name_is_found_when_it_is_the_only_one(tmp_path, name):
    write(tmp_path / name, arrays((2,)))
    assert Checkpoint.open(tmp_path).names == ("t0",)


def test_shards_become_one_checkpoint(tmp_path):
    tensors = sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.entries) == set(tensors)
    assert [f.path.name for f in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert checkpoint.names == ("t0", "t1", "u")
    assert checkpoint.nbytes == sum(a.nbytes for a in tensors.values())


def test_shards_behind_symlinks_out_of_the_folder_work(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(Checkpoint.open(snapshot)) == 3


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.safetensors", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "", 3]
)
def test_an_index_that_names_files_outside_its_folder_is_refused(tmp_path, name):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="only files inside its own folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not JSON"),
        ("[]", "no table weight_map"),
        ('{"weight_map": {}}', "no table weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "occurs twice"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files .*model-2\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_tensor_its_shard_lacks_is_named(tmp_path):
    sharded(tmp_path)
    write(tmp_path / "model-2.safetensors", arrays((2,)))
    with pytest.raises(CheckpointError, match=r"'u' in model-2\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_name_that_is_not_there_brings_the_nearest_ones(tmp_path):
    write(tmp_path / "model.safetensors", {"block.0.weight": arrays((2,))["t0"]})
    with pytest.raises(CheckpointError, match=r"block\.0\.wieght.*nearest are block\.0\.weight"):
        Checkpoint.open(tmp_path)["block.0.wieght"]


def test_what_a_folder_without_weights_holds_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"but config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint.open(tmp_path / "elsewhere")


def test_several_files_without_an_index_are_not_guessed_between(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / name, arrays((2,)))
    with pytest.raises(CheckpointError, match=r"2 files .* no index"):
        Checkpoint.open(tmp_path)


def test_a_lone_shard_is_not_taken_for_the_whole(tmp_path):
    path = write(tmp_path / "model-00001-of-00004.safetensors", arrays((2,)))
    with pytest.raises(CheckpointError, match=r"the one shard .* no index"):
        Checkpoint.open(tmp_path)
    assert len(Checkpoint.open(path)) == 1  # named, it is what was asked for


@pytest.fixture
def powerless():
    """Run as a user who may read nothing of ours, where we are one who could."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_checkpoint_one_may_not_read_is_refused_with_the_cause(tmp_path, powerless):
    inner = tmp_path / "inner"
    if os.geteuid() != 65534:
        write(tmp_path / "model.safetensors", arrays((2,)))
        tmp_path.chmod(0)
    with pytest.raises(CheckpointError, match=r"Permission denied; check the path and its perm"):
        Checkpoint.open(inner / "model.safetensors")
    if os.geteuid() != 65534:
        tmp_path.chmod(0o700)


def test_reading_safetensors_needs_no_torch(tmp_path):
    write(tmp_path / "model.safetensors", arrays((2,)))
    code = (
        "import sys; from blockstream.checkpoint import Checkpoint; "
        "import blockstream.checkpoint.file_store, blockstream.checkpoint.write.packer; "
        f"Checkpoint.open({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_of_a_folder_the_file_that_is_no_file_is_named(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{tmp_path / name}: cannot be read: is a FIFO"):
        Checkpoint.open(tmp_path)
