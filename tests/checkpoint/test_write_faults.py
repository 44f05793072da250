"""Killed at any change of a file, or the disk full there, and asked again: `pack` and `synth` are done."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.packer import pack, verify_pack
from blockstream.checkpoint.write.synthesis import synthesise
from tests.support import faults
from tests.support.checkpoint_files import write
from tests.support.power_cut import recorded

PACK = """
from blockstream.checkpoint.write.packer import pack
import os
SOURCE = Path(os.environ["FAULT_SOURCE"])
def act(folder):
    beside = {"config.json": b"{}", "x.model": b"m"}
    pack(SOURCE, folder / "pack", {"a": ("t0",), "b": ("t1",)}, "bf16", beside=beside)
"""
SYNTH = """
from blockstream.checkpoint.write import synthesis
synthesis.POOL = synthesis._STEP = 4099  # numbers are drawn for each attempt
%s
SPEC = {"a.weight": ("F32", (8, 8)), "b.weight": ("F32", (8, 8)), "c.weight": ("BF16", (4,))}
def act(folder):
    note, beside = {"architecture": "x"}, {"config.json": b"{}"}
    synthesis.synthesise(SPEC, folder / "made", %r, 300, 3, note=note, beside=beside)
"""


BESIDE = {"config.json": b"{}"}


def check(rows, kinds, whole, said):
    """Assert that each attempt was cut where it should be, and that the next one came to the same end."""
    assert {row["kind"] for row in rows} == kinds
    for row in rows:
        code, message, _ = row["first"]
        assert code == (-signal.SIGKILL if row["kind"] == "kill" else 3) or code == 0, row
        assert "Traceback" not in message, row
        if code == 3:
            assert any(words in message for words in said), row
        code, message, _ = row["again"]
        assert code == 0 or (message.startswith("CheckpointError") and "already" in message), row
        whole(Path(row["folder"]))


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    tensors = {f"t{i}": np.arange(64, dtype=np.float32).reshape(8, 8) for i in range(3)}
    write(tmp_path / "source" / "model.safetensors", tensors)
    monkeypatch.setenv("FAULT_SOURCE", str(tmp_path / "source"))
    return tensors


@pytest.mark.slow
def test_a_pack(source, tmp_path):
    rows = faults.run(PACK, tmp_path / "packs")
    assert len(rows) > 60
    assert all(row["again"][0] == 0 for row in rows)

    def whole(folder):
        assert set(Checkpoint.open(folder / "pack").entries) == set(source)
        verify_pack(folder / "pack")
        files = ["0000.a.safetensors", "0001.b.safetensors", "0002.rest.safetensors"]
        assert faults.names(folder / "pack") == [*files, "blockstream.json", "config.json", "x.model"]

    check(
        rows,
        {"kill", "full"},
        whole,
        ["the disk is full; free some space", "cannot be made"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "first"), [("safetensors", ""), ("bin", "import blockstream.module.torch_pickle")]
)
def test_random_weights(layout, first, tmp_path):
    rows = faults.run(SYNTH % (first, layout), tmp_path / "made")
    assert len(rows) > 50
    assert all(row["left"] == [] for row in rows if row["kind"] == "full" and row["first"][0])
    sound = []

    def whole(folder):
        opened = Checkpoint.open(folder / "made")
        assert opened.synthetic == {"seed": 3, "architecture": "x"}
        sound.append({name: (folder / "made" / name).read_bytes() for name in faults.names(folder / "made")})
        assert sound[-1] == sound[0]
        assert len(sound[0]) == len(opened.files) + 3, sound[0].keys()

    check(rows, {"kill", "full"}, whole, ["the disk is full", "cannot be made"])


def test_a_power_cut_takes_nothing_of_a_pack_or_of_synthesised_weights(source, tmp_path, monkeypatch):
    root = tmp_path / "disk"
    root.mkdir()
    with recorded(root, monkeypatch) as disk:
        pack(
            tmp_path / "source", root / "packs" / "pack", {"a": ("t0",), "b": ("t1",)}, "bf16", beside=BESIDE
        )
        spec = {"a.weight": ("F32", (8, 8)), "b.weight": ("F32", (8, 8))}
        synthesise(spec, root / "made", "safetensors", 300, 3, beside=BESIDE)
    assert not disk.early and not disk.lost()
    assert sum(name.endswith(".safetensors") for name in disk.renames) == 5
