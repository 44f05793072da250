"""Reading speed of a disk, and what kind of disk it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from blockstream.errors import ConfigError
from blockstream.system import machine, probe
from blockstream.system.mounts import file_system
from blockstream.system.probe import cached_nbytes, disk
from tests.support.machine import Machine

MIB = 1 << 20
SMALL = {"nbytes": 16 * MIB, "limit_s": 0.05, "rounds": 2, "ways": ((4 * MIB, 2), (4 * MIB, 1), (MIB, 1))}
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for direct reads")


@pytest.fixture
def weights(tmp_path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1 * MIB) * 20 + b"tail")
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return file


def refuse_direct(monkeypatch) -> None:
    whole = probe.DirectReader.set_direct

    def set_direct(self, on):
        if on:
            raise OSError(errno.EINVAL, "Invalid argument")
        whole(self, on)

    monkeypatch.setattr(probe.DirectReader, "set_direct", set_direct)


@linux
def test_a_folder_is_measured_both_ways_and_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("kept")
    speed = disk(tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (speed.fresh, speed.file_nbytes) == (True, 16 * MIB)
    ways = {(t.mode, t.request_nbytes, t.depth) for t in speed.trials}
    modes = {"buffered"} if speed.direct_refused else {"direct", "buffered"}
    assert ways == {(mode, *way) for mode in modes for way in SMALL["ways"]}
    assert all(len(t.bytes_per_s) == 2 and min(t.bytes_per_s) > 0 for t in speed.trials)
    assert speed.bytes_per_s == max(t.median for t in speed.trials)


@linux
def test_a_file_is_measured_in_place_and_keeps_its_bytes_and_no_pages(weights):
    before = weights.read_bytes()
    assert cached_nbytes(weights) >= len(before)
    speed = disk(weights, **SMALL)
    if file_system(weights).kind == "local":
        assert cached_nbytes(weights) == 0
    assert (speed.fresh, speed.file_nbytes) == (False, 20 * MIB)
    assert weights.read_bytes() == before
    assert not any("just written" in note for note in speed.notes)


@linux
def test_every_timed_read_starts_with_nothing_cached(weights, monkeypatch):
    cached, read = [], probe.DirectReader.read

    def spy(self, buffer, request, turn):
        if turn == 0:
            cached.append(cached_nbytes(weights))
        return read(self, buffer, request, turn)

    weights.read_bytes()
    monkeypatch.setattr(probe.DirectReader, "read", spy)
    disk(weights, **{**SMALL, "ways": ((4 * MIB, 1), (MIB, 1))})
    if file_system(weights).kind != "local":
        pytest.skip("the cache of this file system cannot be dropped")
    assert cached == [0] * len(cached) != []


@linux
def test_direct_reads_leave_the_page_cache_empty(weights, monkeypatch):
    after, drop = [], probe.DirectReader.drop
    reader_fd = os.open(weights, os.O_RDONLY)
    try:
        reader = probe.DirectReader(reader_fd, 20 * MIB)
        if reader.refusal() or file_system(weights).kind != "local":
            pytest.skip("this file system does not read past the page cache")
        drop(reader)
        monkeypatch.setattr(probe.DirectReader, "drop", lambda self: after.append(cached_nbytes(weights)))
        reader.measure("direct", 4 * MIB, 1, 0.01)
        reader.measure("buffered", 4 * MIB, 1, 0.01)
    finally:
        os.close(reader_fd)
    assert after[:3] == [0, 0, 0]  # around the direct reads, and before the buffered ones
    assert after[3] > 0


def test_where_direct_reads_are_refused_the_reason_is_said_and_buffered_ones_are_measured(
    tmp_path, monkeypatch
):
    refuse_direct(monkeypatch)
    speed = disk(tmp_path, **SMALL)
    assert speed.direct_refused == os.strerror(errno.EINVAL)
    assert speed.direct is None
    assert speed.buffered.median == speed.bytes_per_s
    assert any("go through the page cache" in note for note in speed.notes)


def test_a_disk_that_fails_while_reading_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, buffer, request, turn):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(probe.DirectReader, "read", fail)
    with pytest.raises(OSError, match="Input/output"):
        disk(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_endless_loop(weights):
    descriptor = os.open(weights, os.O_RDONLY)
    try:
        reader = probe.DirectReader(descriptor, 20 * MIB)
        os.truncate(weights, 6 * MIB)
        with pytest.raises(OSError, match=f"ended at {6 * MIB}"):
            reader.measure("buffered", 4 * MIB, 1, 60)
    finally:
        os.close(descriptor)


def test_a_small_file_is_refused_with_what_is_needed(tmp_path):
    file = tmp_path / "small"
    file.write_bytes(bytes(3 * MIB))
    with pytest.raises(ConfigError, match=r"3\.0 MiB; measuring needs 16 MiB"):
        disk(file)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100 * MIB, 50 * MIB, 50 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(probe, "fill", lambda *args: pytest.fail("wrote"))
    with pytest.raises(ConfigError, match="50 MiB free"):
        disk(tmp_path)


def test_a_disk_with_little_space_is_measured_with_less(tmp_path, monkeypatch):
    free = probe.KEEP_FREE_NBYTES + 20 * MIB
    usage = namedtuple("usage", "total used free")(free, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert disk(tmp_path, **{**SMALL, "nbytes": 1 << 40}).file_nbytes <= 20 * MIB


def test_a_path_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere cannot be read"):
        disk(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(probe.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="cannot be written"):
        disk(tmp_path, **SMALL)


def test_a_measurement_is_plain_json(tmp_path):
    facts = json.loads(json.dumps(disk(tmp_path, **SMALL).as_dict()))
    assert facts["buffered"]["bytes_per_s"] > 0
    assert facts["file_system"]["fstype"]


@pytest.mark.parametrize("slow_first", [True, False])
def test_a_cache_below_the_system_shows_as_a_slow_first_round(slow_first):
    speeds = (0.5e9, 2e9, 2e9) if slow_first else (2e9, 2e9, 2e9)
    notes = list(probe.cache_notes([probe.Trials("direct", MIB, 1, speeds)], False, 0.0))
    assert bool(notes) is slow_first
    assert not slow_first or "first round read at 0.50 GB/s, later ones at 2.00" in notes[0]


# ---- what is cached


def test_how_much_of_a_file_is_cached_is_known(weights):
    weights.read_bytes()
    assert cached_nbytes(weights) == 20 * MIB + 4096
    empty = weights.with_name("empty")
    empty.touch()
    assert cached_nbytes(empty) == 0


# ---- file systems


@pytest.mark.parametrize(
    ("mount", "fstype", "kind"),
    [
        ("8:1 / /data rw - ext4 /dev/sda1 rw", "ext4", "local"),
        ("0:50 / /data rw - nfs4 host:/share rw,vers=4.2", "nfs4", "network"),
        ("0:51 / /data rw - cifs //host/share rw", "cifs", "network"),
        ("0:52 / /data rw - fuse.sshfs me@host:/share rw", "fuse.sshfs", "network"),
        ("0:52 / /data rw - fuse.rclone remote:bucket rw", "fuse.rclone", "network"),
        ("0:53 / /data rw - fuseblk /dev/sdb1 rw", "fuseblk", "local"),
        ("0:54 / /data rw - 9p C:\\134 rw", "9p", "network"),
        ("0:55 / /data rw - overlay overlay rw,lowerdir=/a:/b", "overlay", "overlay"),
        ("0:55 / /data rw - fuse.fuse-overlayfs fuse-overlayfs rw", "fuse.fuse-overlayfs", "overlay"),
        ("0:56 / /data rw - tmpfs tmpfs rw", "tmpfs", "memory"),
    ],
)
def test_the_kind_of_file_system_is_known(tmp_path, mount, fstype, kind):
    fake = Machine(tmp_path).process("", "1 0 254:0 / / rw - ext4 /dev/vda rw", f"2 1 {mount}")
    got = file_system("/data/models/x.bin", fake.root)
    assert (got.fstype, got.kind, got.point) == (fstype, kind, "/data")


def test_the_deepest_mount_wins_and_the_last_of_equals_and_names_are_whole(tmp_path):
    fake = Machine(tmp_path).process(
        "",
        "1 0 254:0 / / rw - ext4 /dev/vda rw",
        r"2 1 0:60 / /data/my\040disk rw - xfs /dev/sdc rw",
        "3 1 0:61 / /data rw - ext4 /dev/sda1 rw",
        "4 1 0:62 / /data rw - btrfs /dev/sdb1 rw",
    )
    assert file_system("/data/my disk/x", fake.root).fstype == "xfs"
    assert file_system("/data/x", fake.root).fstype == "btrfs"
    assert file_system("/database/x", fake.root).source == "/dev/vda"


def test_without_a_mount_table_the_kind_is_unknown(tmp_path):
    assert file_system("/data", tmp_path).kind == "unknown"


# ---- the machine


def test_the_facts_of_this_machine_are_plain_json_and_import_no_framework(tmp_path):
    program = (
        "import json, sys; from blockstream.system.machine import doctor_facts;"
        "print(json.dumps(doctor_facts(measure=False)));"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    facts = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True, cwd=tmp_path))
    assert facts["memory"]["nbytes"] > 0
    assert facts["memory"]["limits"][0]["free_nbytes"] == facts["memory"]["nbytes"]
    assert facts["cpu"]["threads"] >= 1
    assert facts["versions"].keys() == set(machine.PACKAGES)
    assert facts["versions"]["psutil"]
