"""What a process holds before any weight, and the folder of what can be made again."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from blockstream.errors import BudgetError
from blockstream.system import runtime_floor as floors
from blockstream.system.cache import cache_folder
from blockstream.system.runtime_floor import runtime_floor

MIB = 1 << 20


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package that holds 40 MiB once imported, and counts its imports."""
    folder = tmp_path / "site"
    (folder / "heavypkg").mkdir(parents=True)
    (folder / "heavypkg/__init__.py").write_text("")
    count = folder / "count"
    (folder / "heavypkg/inner.py").write_text(
        f"held = bytearray(b'x') * (40 << 20)\nwith open({str(count)!r}, 'a') as f: f.write('.')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return count


def test_a_floor_is_measured_once_and_read_from_the_cache_after(package, tmp_path):
    folder = tmp_path / "cache"
    nothing = runtime_floor([], folder)
    first = runtime_floor(["heavypkg.inner"], folder)
    again = runtime_floor(["heavypkg.inner"], folder)
    assert first.nbytes - nothing.nbytes == pytest.approx(40 * MIB, abs=6 * MIB)
    assert (first.measured, again.measured) == (True, False)
    assert again.nbytes == first.nbytes
    assert package.read_text() == "."
    assert "heavypkg" not in sys.modules
    assert runtime_floor(["heavypkg.inner"], folder, fresh=True).measured


def test_another_version_is_another_floor(package, tmp_path, monkeypatch):
    runtime_floor(["heavypkg.inner"], tmp_path)
    monkeypatch.setattr(floors, "version_of", lambda module: f"{module} 2.0")
    got = runtime_floor(["heavypkg.inner"], tmp_path)
    assert got.measured
    assert got.versions[1:] == ("heavypkg.inner 2.0",)


def test_modules_that_are_not_installed_are_left_out(tmp_path):
    assert runtime_floor(["surely_not_installed.inner"], tmp_path).versions[1:] == ()


def test_a_module_that_cannot_be_imported_is_named_with_its_error(package, tmp_path):
    (package.parent / "heavypkg/broken.py").write_text("raise RuntimeError('no such chip')")
    with pytest.raises(BudgetError, match=r"heavypkg\.broken could not be.*no such chip"):
        runtime_floor(["heavypkg.broken"], tmp_path)
    assert list(tmp_path.glob("floor-*")) == []


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"nbytes": "7"}', '{"nbytes": -1}', '{"nbytes": true}'])
def test_a_cache_that_holds_junk_is_measured_again_and_mended(junk, tmp_path):
    runtime_floor([], tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(junk)
    assert runtime_floor([], tmp_path).measured
    assert json.loads(file.read_text())["nbytes"] > 0
    assert list(tmp_path.iterdir()) == [file]  # no draft is left beside it


def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert runtime_floor([], tmp_path / "file/cache").measured


def test_a_cache_file_that_cannot_be_replaced_leaves_no_draft(tmp_path):
    runtime_floor([], tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    assert runtime_floor([], tmp_path).measured
    assert list(tmp_path.iterdir()) == [file]


def test_a_module_of_the_working_folder_does_not_stand_in_for_an_installed_one(tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert runtime_floor(["psutil"], tmp_path / "cache").nbytes > 0


def test_measuring_at_the_same_time_leaves_one_good_file(tmp_path):
    threads = [threading.Thread(target=runtime_floor, args=([], tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["nbytes"] > 0


def test_the_cache_folder_follows_its_own_variable_then_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BLOCKSTREAM_CACHE")
    assert cache_folder() == tmp_path / "xdg/blockstream"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache/blockstream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/blockstream"
