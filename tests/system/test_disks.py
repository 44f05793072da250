"""A disk is measured once and kept; how it is read follows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockstream.checkpoint.read.reader import BLOCK
from blockstream.report.outcome import disk_account
from blockstream.system import calibration
from blockstream.system.disks import Requests, disk_speed, requests
from blockstream.system.mounts import file_system
from blockstream.system.probe import WAYS, DiskSpeed, Trials

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1")
    large.write_bytes(b"12")
    return [small, large]


def speeds(**by_way) -> DiskSpeed:
    """Return a disk that read so many GB/s in two rounds; ways are named as request x depth."""
    trials = [
        Trials(
            "direct", int(way[1:].split("x")[0]) * MIB, int(way.split("x")[1]), tuple(1e9 * s for s in each)
        )
        for way, each in by_way.items()
    ]
    return DiskSpeed("disk", file_system(Path("/")), 1 << 30, False, tuple(trials), None, 1.0)


@pytest.fixture
def measured(monkeypatch):
    """Have the next measurement find what is put in; return the files measured."""
    seen, found = [], {}

    def disk(path, **_):
        seen.append(path)
        return found["speed"]

    def set_speed(**by_way):
        found["speed"] = speeds(**by_way)
        return seen

    monkeypatch.setattr("blockstream.system.disks.disk", disk)
    return set_speed


def test_a_disk_is_measured_once_and_kept(files, measured):
    seen = measured(_16x4=(1.4, 1.6))
    assert disk_speed(files) == disk_speed(files) == 1.5e9
    assert seen == [files[1]], "the largest, once"
    assert calibration.read(calibration.disk_speed_of(files[1])) == {"bytes_per_s": 1.5e9}


def test_a_disk_that_cannot_be_measured_is_left_open(tmp_path):
    tiny = tmp_path / "tiny"
    tiny.write_bytes(b"1")
    assert disk_speed([tiny]) is None
    assert disk_speed([tmp_path / "gone"]) is None
    stages = [{"load_s": 2.0, "read_nbytes": 10, "files": [str(tiny)]}, {"load_s": 0.0, "read_nbytes": 0}]
    found = disk_account(stages, wall_s=4.0)
    assert found.pop("a_year_nbytes") == 10 / 4 * 365 * 86_400
    assert found == {"read_nbytes": 10, "read_bytes_per_s": 5.0, "disk_bytes_per_s": None}


def test_a_disk_not_measured_is_read_as_usual(files, tmp_path):
    assert requests(files) == requests([]) == requests([tmp_path / "gone"]) == Requests()
    assert WAYS[0] == (Requests().request_nbytes, Requests().threads), "the probe tries it"


def test_a_way_that_was_faster_in_every_round_is_taken(files, measured):
    measured(_16x4=(1.0, 1.1), _16x1=(1.2, 1.3), _4x1=(1.5, 1.2))
    disk_speed(files)
    assert requests(files) == Requests(1, 4 * MIB)


def test_a_way_that_was_faster_at_times_is_not(files, measured):
    measured(_16x4=(1.0, 1.4), _16x1=(1.5, 1.3))
    disk_speed(files)
    assert requests(files) == Requests()


@pytest.mark.parametrize("threads, nbytes", [(0, 0), (1e9, 1)])
def test_numbers_that_nobody_measured_are_kept_in_bounds(files, threads, nbytes):
    about = calibration.disk_speed_of(files[0])
    calibration.write(about, {"threads": threads, "request_nbytes": nbytes})
    found = requests(files)
    assert 1 <= found.threads <= 64
    assert found.request_nbytes == BLOCK
