"""What is installed is what pyproject.toml says: every package, every file of data, without a warning."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]


def folder_of(package):
    top, _, below = package.partition(".")
    return ROOT / FOLDERS.get(top, top) / below.replace(".", "/")


def test_every_package_is_named_and_there():
    named = SETUPTOOLS["packages"]
    assert [p for p in named if not (folder_of(p) / "__init__.py").is_file()] == []
    for top in {p.partition(".")[0] for p in named}:
        there = {f.parent for f in folder_of(top).rglob("*.py")} if top != "blockstream_examples" else set()
        missing = there - {folder_of(p) for p in named}
        assert not missing, f"{missing} have modules and are not installed"


def test_every_pattern_of_data_finds_a_file():
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert any(f.is_file() for f in folder_of(package).glob(pattern)), f"{package}: {pattern}"


def test_setuptools_takes_no_data_that_is_not_named_and_so_warns_of_none():
    """With `include-package-data` it warns, twenty lines each, of every folder of data that is no package."""
    assert SETUPTOOLS["include-package-data"] is False


def test_every_entry_point_names_what_can_be_imported():
    """An object of a module is a dotted name: a file with a hyphen would end every installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"scripts": project["scripts"], **project["entry-points"]}
    for group, points in groups.items():
        for name, value in points.items():
            parts = value.replace(":", ".").split(".")
            assert all(part.isidentifier() for part in parts), f"{group}: {name} = {value}"
