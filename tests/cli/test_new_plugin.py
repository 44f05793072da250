"""`blockstream plugins new` writes packages that install, are found by name and pass their own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest

from blockstream.cli.plugin_templates import KINDS, files_of


def install_in_place(folder):
    """Write the metadata an editable install would, from the package's own pyproject."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(points))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_new_package_passes_its_own_tests(command, tmp_path, kind):
    code, out, _ = command("plugins", "new", "my-own", "--kind", kind, "--into", str(tmp_path))
    folder = tmp_path / "blockstream-my-own"
    assert (code, str(folder) in out) == (0, True)
    install_in_place(folder)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
