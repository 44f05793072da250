"""What is installed is what pyproject.toml says: every package, every file of data, without a warning."""

from __future__ import annotations

import re
import tomllib
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = TOML["project"], TOML["tool"]["setuptools"]
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
    groups = {"scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    for group, points in groups.items():
        for name, value in points.items():
            parts = value.replace(":", ".").split(".")
            assert all(part.isidentifier() for part in parts), f"{group}: {name} = {value}"


def test_the_wheel_stays_under_25_megabytes():
    """By what its files compress to; weights do not."""
    data = {
        f
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for f in folder_of(package).glob(pattern)
        if f.is_file()
    }
    weights = {f for f in data if f.suffix == ".safetensors"}
    others = {f for p in SETUPTOOLS["packages"] for f in folder_of(p).glob("*.py")} | data - weights
    packed = sum(len(zlib.compress(f.read_bytes())) for f in others)
    assert packed + sum(f.stat().st_size for f in weights) < 25_000_000


def test_every_package_of_the_wheel_is_typed():
    marked = {p for p, patterns in SETUPTOOLS["package-data"].items() if "py.typed" in patterns}
    tops = {p.partition(".")[0] for p in SETUPTOOLS["packages"]}
    assert marked == tops - {"blockstream_examples"}  # configs alone


def test_the_version_is_the_changelogs_newest():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.group(1) == PROJECT["version"]
