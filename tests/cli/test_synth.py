"""`synth` writes folders that the usual libraries and blockstream open, marked as what they are."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write import synthesis as synth
from blockstream.checkpoint.write.writer import FileWriter
from tests.support.t5_folders import t5_config

IDS = torch.tensor([[5, 9, 3, 1]])


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_t5_folder_as_users_have_it_two_bin_files_index_and_tokenizer(command, tmp_path):
    source, dst = t5_config(tmp_path / "t5"), tmp_path / "made"
    code, out, _ = command("synth", str(source), str(dst), "--layout", "bin", "--shard", "100kB")
    assert code == 0
    files = {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    small = {"pytorch_model.bin.index.json", "config.json", "spiece.model", "synthetic.json"}
    assert names(dst) == files | small
    assert all((dst / name).stat().st_size < 120_000 for name in files)
    index = json.loads((dst / "pytorch_model.bin.index.json").read_text())
    held = {n: torch.load(dst / n, weights_only=True) for n in files}
    assert {n: file for file, tensors in held.items() for n in tensors} == index["weight_map"]
    assert json.loads((dst / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert out == f"{dst}: {len(index['weight_map'])} random tensors of t5, 158 KiB in 2 files\n"


def test_transformers_loads_what_is_written_and_streaming_gives_the_same(command, tmp_path):
    from transformers import T5EncoderModel

    from tests.support.models import aligned

    dst = tmp_path / "made"
    assert command("synth", str(t5_config(tmp_path / "t5")), str(dst), "--layout", "bin")[0] == 0
    loaded, said = T5EncoderModel.from_pretrained(dst, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    with torch.no_grad(), blockstream.from_pretrained(dst, arena="1MiB") as m:
        assert torch.equal(m(input_ids=IDS)[0], aligned(loaded)(input_ids=IDS)[0])


def test_the_stand_in_tokenizer_splits_text_and_ends_it_as_t5s_does(command, tmp_path):
    from movd.tokenizer import load_tokenizer

    dst = tmp_path / "made"
    assert command("synth", str(t5_config(tmp_path / "t5")), str(dst))[0] == 0
    ids, mask = load_tokenizer(dst, 16).encode(["bad dog"])
    assert ids[0, int(mask.sum()) - 1] == 1 and int(mask.sum()) > 2
    assert int(ids.max()) < 300


def test_the_marker_says_what_the_folder_is(command, tmp_path):
    dst = tmp_path / "made"
    source = t5_config(tmp_path / "t5")
    assert command("synth", str(source / "config.json"), str(dst), "--dtype", "bf16", "--seed", "7")[0] == 0
    made = Checkpoint.open(dst)
    assert made.synthetic == {"seed": 7, "architecture": "t5", "dtype": "bf16"}
    assert {e.dtype for e in made.entries.values()} == {"BF16"}


def test_a_config_of_another_name_is_taken_and_its_folder_left_alone(command, tmp_path):
    source = t5_config(tmp_path / "t5")
    (source / "config.json").rename(source / "mine.json")
    (source / "config.json").write_text("[]")
    assert command("synth", str(source / "mine.json"), str(tmp_path / "made"))[0] == 0
    code, _, err = command("synth", str(source), str(tmp_path / "other"))
    assert (code, "holds no table of settings" in err) == (1, True)


def test_a_diffusers_config_is_known_by_its_class(command, tmp_path):
    (tmp_path / "net").mkdir()
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    dst = tmp_path / "made"
    code, out, _ = command("synth", str(tmp_path / "net"), str(dst))
    assert (code, "tensors of AutoencoderKL" in out) == (0, True)
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad(), blockstream.from_pretrained(dst, arena="4MiB") as m:
        assert m(x).sample.isfinite().all()


@pytest.mark.parametrize(
    ("family", "tensors"), [("t5-v1_1-xxl", 219), ("stdit3-xl-2", 973), ("opensora-vae", 517)]
)
def test_the_families_of_movd_are_known_by_name_and_by_their_own_config(family, tensors, tmp_path):
    from blockstream.module.architectures import find
    from blockstream.module.spec import tensor_spec

    named = find(family)
    spec = tensor_spec(named.module(), "F32")
    (tmp_path / "config.json").write_text(json.dumps(dict(named.config)))
    read = find(str(tmp_path))
    assert tensor_spec(read.module(), "F32") == spec
    assert (read.write_extras is None) == (named.write_extras is None)
    assert len(spec) == tensors


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["t5-v1_1-xl", "made"], 2, "did you mean 't5-v1_1-xxl'"),
        (["empty", "made"], 2, "empty is a folder without a config.json, and no model family 'empty'"),
        (["t5", "t5/config.json/made"], 1, "cannot be made"),
        (["t5", "made", "--seed", "-1"], 2, "--seed -1: write 0 or more"),
        (["t5", "made", "--shard", "many"], 2, "'many' is no amount of memory"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(command, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    t5_config(tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    got, out, err = command("synth", *argv)
    assert (got, out, message in err) == (code, "", True), err
    assert not (tmp_path / "made").exists()


def test_a_folder_with_weights_is_refused(command, tmp_path):
    source, dst = t5_config(tmp_path / "t5"), tmp_path / "made"
    assert command("synth", str(source), str(dst))[0] == 0
    code, _, err = command("synth", str(source), str(dst))
    assert (code, "holds weights already" in err) == (1, True)


def test_a_full_disk_is_said_and_leaves_nothing(command, tmp_path, monkeypatch):
    class Full(FileWriter):
        def __init__(self, path, **options):
            super().__init__(path, pwrite=full if path.suffix == ".safetensors" else os.pwrite)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synth, "FileWriter", Full)
    code, _, err = command("synth", str(t5_config(tmp_path / "t5")), str(tmp_path / "made"))
    assert (code, "the disk is full; free some space" in err) == (1, True)
    assert not (tmp_path / "made").exists()


def test_extras_that_fail_are_blamed_before_anything_is_written(command, tmp_path, monkeypatch):
    def broken(folder):
        raise OSError("no tokenizer today")

    monkeypatch.setattr("movd.tokenizer.write_stand_in", broken)
    code, _, err = command("synth", str(t5_config(tmp_path / "t5")), str(tmp_path / "made"))
    assert (code, "no tokenizer today" in err) == (1, True)
    assert not (tmp_path / "made").exists()
