"""Packages as their authors ship them: built as wheels, put into a fresh folder, run, taken out again."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

#: What `python -m build` and pip ask of a package's build system, for several packages in one process.
BUILD = """
import os, sys
from setuptools import build_meta
into, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    print("built", build_meta.build_wheel(into))
"""


def build(folders: Sequence[Path], into: Path) -> list[Path]:
    """Return the wheels of some packages, built from copies. Skips where there is nothing to build with."""
    into.mkdir()
    copies = [shutil.copytree(folder, into / "sources" / folder.name) for folder in folders]
    done = call("-c", BUILD, into, *copies, site=into, cwd=into)
    if done.returncode and "No module named 'setuptools'" in done.stderr:
        pytest.skip("building a package needs setuptools here")
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        into / line.removeprefix("built ") for line in done.stdout.splitlines() if line.startswith("built ")
    ]


def install(wheel: Path, site: Path) -> None:
    """Unpack a wheel of plain Python into a folder, as an installer does."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)


def remove(wheel: Path, site: Path) -> None:
    """Delete what a wheel's record lists, as an installer does, and what Python compiled of it."""
    (record,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/RECORD")]
    rows = list(csv.reader((site / record).read_text().splitlines()))
    for name, *_ in rows:
        (site / name).unlink()
    for folder in {(site / name).parent for name, *_ in rows}:
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        if folder != site and not any(folder.iterdir()):
            folder.rmdir()


def call(*argv: object, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder of installed packages first on its path."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def blockstream(*argv: object, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    program = "import sys; from blockstream.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return call("-c", program, *argv, site=site, cwd=cwd)
