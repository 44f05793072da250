"""`pack` writes what streams the same, goes on where it stopped, and refuses what is stale or foreign."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.manifest import JOURNAL_NAME, MANIFEST_NAME
from blockstream.checkpoint.write import packer as module
from blockstream.checkpoint.write.packer import verify_pack
from blockstream.checkpoint.write.writer import FileWriter
from tests.support.t5_folders import t5_config, t5_folder

IDS = torch.tensor([[5, 9, 3, 1]])


@pytest.fixture
def source(tmp_path):
    return t5_folder(tmp_path / "t5")


def streamed(folder, **options):
    with torch.no_grad(), blockstream.from_pretrained(folder, arena="1MiB", **options) as m:
        return m(input_ids=IDS)[0], {name: p.dtype for name, p in m.named_parameters()}


def test_a_pack_has_a_file_a_segment_and_streams_the_same(command, source, tmp_path):
    dst = tmp_path / "pack"
    code, out, _ = command("pack", str(source), str(dst))
    assert (code, out) == (0, f"{dst}: 4 segments, 158 KiB\n")
    blocks = [f"000{i + 1}.encoder.block.{i}.safetensors" for i in range(3)]
    others = ["0000.resident.safetensors", "blockstream.json", "config.json"]
    assert sorted(p.name for p in dst.iterdir()) == sorted([*blocks, *others])
    assert verify_pack(dst) > 158 << 10
    assert torch.equal(streamed(dst)[0], streamed(source)[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_converted_pack_streams_as_its_source_converted_while_loading(command, source, tmp_path, dtype):
    dst = tmp_path / "pack"
    assert command("pack", str(source), str(dst), "--dtype", dtype)[0] == 0
    (got, held), (want, asked) = streamed(dst), streamed(source, dtype=dtype)
    assert torch.equal(got, want)
    assert held == asked
    # T5 overflows in half precision, so transformers keeps some of it in float32
    assert (set(held.values()) == {torch.float16, torch.float32}) == (dtype == "fp16")
    named = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert json.loads((dst / "config.json").read_text())["dtype"] == named


def test_a_table_that_is_gathered_by_row_has_a_file_of_its_own(command, tmp_path):
    source, dst = t5_folder(tmp_path / "t5", vocab_size=40_000), tmp_path / "pack"
    assert command("pack", str(source), str(dst))[0] == 0
    assert [p.name for p in sorted(dst.glob("*table*"))] == ["0004.table.shared.weight.safetensors"]
    assert torch.equal(streamed(dst)[0], streamed(source)[0])


def test_tensors_no_segment_uses_are_kept(command, tmp_path, source):
    from safetensors.torch import load_file, save_file

    path = source / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.ones(3)}, path)
    assert command("pack", str(source), str(tmp_path / "pack"))[0] == 0
    assert Checkpoint.open(tmp_path / "pack")["lm_head.weight"].file.path.name == "0004.rest.safetensors"


def test_synthetic_bin_weights_are_packed_with_marker_and_tokenizer(command, tmp_path):
    made, dst = tmp_path / "made", tmp_path / "pack"
    options = ("--layout", "bin", "--shard", "100kB")
    assert command("synth", str(t5_config(tmp_path / "t5")), str(made), *options)[0] == 0
    assert command("pack", str(made), str(dst))[0] == 0
    assert Checkpoint.open(dst).synthetic == Checkpoint.open(made).synthetic
    assert (dst / "spiece.model").read_bytes() == (made / "spiece.model").read_bytes()
    assert not (dst / "pytorch_model.bin.index.json").exists()
    assert torch.equal(streamed(dst)[0], streamed(made)[0])


def test_a_report_says_that_weights_are_synthetic(command, tmp_path):
    from rich.console import Console

    from blockstream.report.summary import print_run

    made = tmp_path / "made"
    assert command("synth", str(t5_config(tmp_path / "t5")), str(made))[0] == 0
    with torch.no_grad(), blockstream.from_pretrained(made, arena="1MiB") as m:
        m(input_ids=IDS)
        (stage,) = blockstream.session(m).report()["stages"]
    assert stage["synthetic"] is True
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    report = {"stages": [{**stage, "predicted_s": 1.0}], "budget": {"nbytes": 2, "peak_nbytes": 1}}
    print_run(report, console)
    console.file.close()
    assert "synthetic weights: model; the result means nothing" in console.export_text()


def test_one_file_is_packed_with_the_config_beside_it(command, source, tmp_path):
    dst = tmp_path / "pack"
    assert command("pack", str(source / "model.safetensors"), str(dst))[0] == 0
    assert torch.equal(streamed(dst)[0], streamed(source)[0])


def test_the_architecture_may_be_named_where_the_folder_has_no_config(command, source, tmp_path):
    bare, dst = tmp_path / "bare", tmp_path / "pack"
    bare.mkdir()
    shutil.copy(source / "model.safetensors", bare)
    code, _, err = command("pack", str(bare), str(dst))
    assert (code, "has no config.json; name its architecture with --model" in err) == (1, True)
    assert not dst.exists()
    assert command("pack", str(bare), str(dst), "--model", str(source))[0] == 0
    assert verify_pack(dst)


class Disk:
    """A disk with room for some segments."""

    def __init__(self, monkeypatch, room: int) -> None:
        self.room = room
        disk = self

        class Writer(FileWriter):
            def __init__(self, path, **options):
                super().__init__(path, **{**options, "pwrite": disk.pwrite})

        monkeypatch.setattr(module, "FileWriter", Writer)

    def pwrite(self, descriptor, view, offset):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        return os.pwrite(descriptor, view, offset)


def test_a_full_disk_is_said_and_the_same_command_goes_on(command, source, tmp_path, monkeypatch):
    dst = tmp_path / "pack"
    disk = Disk(monkeypatch, room=2)
    code, out, err = command("pack", str(source), str(dst))
    assert (code, out) == (1, "")
    assert "the disk is full; free some space and run the same command again" in err
    assert (dst / JOURNAL_NAME).exists() and not (dst / MANIFEST_NAME).exists()
    first = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.safetensors")}
    assert len(first) == 2
    disk.room = 100
    assert command("pack", str(source), str(dst))[0] == 0
    assert disk.room == 98  # the two that were there are not written again
    assert {n: (dst / n).stat().st_mtime_ns for n in first} == first
    assert verify_pack(dst)
    assert torch.equal(streamed(dst)[0], streamed(source)[0])


def test_an_interrupted_pack_in_another_dtype_is_not_gone_on_with(command, source, tmp_path, monkeypatch):
    dst = tmp_path / "pack"
    disk = Disk(monkeypatch, room=1)
    assert command("pack", str(source), str(dst))[0] == 1
    disk.room = 100
    code, _, err = command("pack", str(source), str(dst), "--dtype", "bf16")
    assert (code, "unfinished pack of another source, dtype or partition" in err) == (1, True)


def test_small_files_missing_from_a_finished_pack_are_brought(command, source, tmp_path):
    dst = tmp_path / "pack"
    assert command("pack", str(source), str(dst))[0] == 0
    (dst / "config.json").write_text("{")  # as a kill would not leave it, and a mishap might
    assert command("pack", str(source), str(dst))[0] == 0
    assert (dst / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_stale_pack_is_refused(command, source, tmp_path):
    dst = tmp_path / "pack"
    assert command("pack", str(source), str(dst))[0] == 0
    os.utime(source / "model.safetensors", ns=(1, 1))
    code, _, err = command("pack", str(source), str(dst))
    assert (code, "is stale" in err, "pack the source again to a new folder" in err) == (1, True, True)


def test_a_foreign_folder_is_refused_and_left_alone(command, source, tmp_path):
    dst = tmp_path / "mine"
    dst.mkdir()
    (dst / "letter.txt").write_text("dear")
    code, _, err = command("pack", str(source), str(dst))
    assert (code, "is not empty (letter.txt); choose another folder" in err) == (1, True)
    assert [p.name for p in dst.iterdir()] == ["letter.txt"]


def test_the_checkpoint_of_another_model_is_refused_and_nothing_written(command, source, tmp_path):
    other, dst = t5_config(tmp_path / "other", num_layers=5), tmp_path / "pack"
    code, _, err = command("pack", str(source), str(dst), "--model", str(other))
    assert (code, "is this the checkpoint of another model?" in err) == (1, True)
    assert not dst.exists()


def test_int8_rounds_the_blocks_and_says_what_each_matrix_lost(command, source, tmp_path):
    dst = tmp_path / "pack"
    code, out, _ = command("pack", str(source), str(dst), "--dtype", "int8")
    first, head, *rows = out.splitlines()
    assert (code, first.startswith(f"{dst}: 4 segments, ")) == (0, True)
    assert head.startswith("int8: 21 matrices; worst error in parts of the largest weight")
    assert len(rows) == 13
    losses = [float(row.split()[-1]) for row in rows[:-1]]
    assert losses == sorted(losses, reverse=True)
    assert all(0 < loss < 0.01 for loss in losses)
    assert rows[-1].strip().startswith("9 more lost less, rms down to")
    assert json.loads((dst / "config.json").read_text())["dtype"] == "float32"
    manifest = json.loads((dst / MANIFEST_NAME).read_text())
    assert sum(len(s["int8"]) for s in manifest["segments"]) == 21
    (got, held), (want, _) = streamed(dst), streamed(source)
    assert torch.int8 in set(held.values())
    assert 0 < float((got - want).norm() / want.norm()) < 0.03
    assert command("pack", str(source), str(dst), "--dtype", "int8")[:2] == (0, out)


def test_blocks_in_int8_take_a_quarter_and_their_scales_little(command, tmp_path):
    source, dst = t5_folder(tmp_path / "t5", d_model=256, d_ff=512), tmp_path / "pack"
    assert command("pack", str(source), str(dst), "--dtype", "int8")[0] == 0
    blocks = {n: e for n, e in Checkpoint.open(dst).entries.items() if n.startswith("encoder.block")}
    linear = [e for n, e in blocks.items() if e.dtype == "I8"]
    rest = sum(e.nbytes for e in blocks.values()) - sum(e.nbytes for e in linear)
    original = Checkpoint.open(source)
    assert sum(e.nbytes for e in linear) * 4 == sum(original[e.name].nbytes for e in linear)
    assert rest < 0.05 * sum(e.nbytes for e in linear)
