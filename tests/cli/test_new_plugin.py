"""`blockstream plugins new` writes whole packages, or nothing; they are run as installed packages are."""

from __future__ import annotations

import pytest

from blockstream.cli.plugin_templates import KINDS, files_of


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_placeholder_is_filled(kind):
    for path, text in files_of("leaps", kind).items():
        assert "$" not in path + text
        assert text.endswith("\n")
        assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", ["Leaps", "3d", "le aps", "leaps-", "", "../leaps", "leaps.py"])
def test_a_name_that_cannot_be_one_is_refused(command, tmp_path, name):
    code, _, err = command("plugins", "new", name, "--into", str(tmp_path))
    assert (code, "is no name for a plugin" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_plugin_is_refused(command, site, tmp_path):
    code, _, err = command("plugins", "new", "video", "--into", str(tmp_path / "new"))
    assert (code, "'video' is installed already, from video-package 2.0" in err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_stays_as_it_is(command, tmp_path):
    theirs = tmp_path / "blockstream-leaps"
    theirs.mkdir()
    (theirs / "kept").write_text("")
    code, _, err = command("plugins", "new", "leaps", "--into", str(tmp_path))
    assert (code, "exists already" in err) == (2, True)
    assert [p.name for p in tmp_path.rglob("*")] == ["blockstream-leaps", "kept"]


def test_a_failure_leaves_nothing_behind(command, tmp_path, monkeypatch):
    monkeypatch.setattr("blockstream.cli.new_plugin.files_of", lambda name, kind: {"a": "x", "b": None})
    code, _, _ = command("plugins", "new", "leaps", "--into", str(tmp_path))
    assert code == 1
    assert not list(tmp_path.iterdir())
