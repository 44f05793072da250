"""Only regular files are opened, whatever names them, and nothing waits for one that is not."""

from __future__ import annotations

import ast
import os
from pathlib import Path

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


ROOT = Path(__file__).parent.parent.parent
FILES = [p for room in ("blockstream", "movd", "plugins") for p in sorted((ROOT / room).rglob("*.py"))]
#: Files that read otherwise, and what they read.
OTHERWISE = {
    "blockstream/system/regular.py": "the door",
    "blockstream/system/mounts.py": "files of /proc and of control groups",
    "blockstream/report/shell.py": "what is installed with the package",
    "blockstream/run/config.py": "examples that are installed with a package",
    "blockstream/cli/synth.py": "what it has just written",
    "plugins/blockstream_web/app.py": "a page that is installed with the package",
}
#: What a library opens by its name is checked in the same file.
LIBRARIES = {"safe_open", "load_file", "torch.load", "from_file", "Image.open"}


def calls(path):
    tree = ast.parse(path.read_text())
    return [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_files_are_read_through_this_door_alone():
    assert len(FILES) > 150
    reading = {
        str(path.relative_to(ROOT)): call
        for path in FILES
        for call in calls(path)
        if call.endswith((".read_text", ".read_bytes")) and not call.startswith("regular.")
    }
    assert reading.keys() <= OTHERWISE.keys(), "read it with blockstream.system.regular"


def test_what_libraries_open_by_name_is_checked_first():
    for path in FILES:
        called = set(calls(path))
        if any(call in LIBRARIES or call.endswith(".from_file") for call in called):
            door = {"regular.check", "entry.file.check"} & called
            assert door, f"{path.relative_to(ROOT)}: check the file with blockstream.system.regular first"
