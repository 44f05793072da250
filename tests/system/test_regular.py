"""Only regular files are opened, whatever names them, and nothing waits for one that is not."""

from __future__ import annotations

import os

import pytest

from blockstream.system import regular


def test_what_is_no_regular_file_is_refused_before_it_is_opened(odd_file, tmp_path, monkeypatch):
    make, said = odd_file
    path = make(tmp_path / "x")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    for door in (regular.check, regular.descriptor, regular.opened, regular.read_bytes, regular.read_text):
        with pytest.raises(regular.FileRefusedError, match=said):
            door(path)


def test_a_file_exchanged_for_a_fifo_after_the_check_is_found_out_and_closed(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("whole")
    was = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(regular.os, "stat", lambda _: was)
    with pytest.raises(regular.FileRefusedError, match="is a FIFO"):
        regular.opened(path)


def test_a_file_is_read_whole_or_refused_by_its_size(tmp_path):
    path = tmp_path / "x"
    path.write_text("ä" * 10, encoding="utf-8")
    assert regular.read_text(path, 20) == "ä" * 10
    with pytest.raises(OSError, match="has 20 bytes or more, at most 19 are read"):
        regular.read_bytes(path, 19)
    with pytest.raises(FileNotFoundError):
        regular.check(tmp_path / "nothing")
    with pytest.raises(OSError, match="is a folder"):
        regular.check(tmp_path)


def test_the_systems_own_files_have_no_size_and_are_read():
    assert b"Linux" in regular.read_bytes("/proc/version", 10_000)
    with pytest.raises(OSError, match="at most 3 are read"):
        regular.read_bytes("/proc/version", 3)
