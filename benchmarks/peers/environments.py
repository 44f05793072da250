"""Environments for peers: made one at a time from the package index, removed after use."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
#: What the networks need, whoever runs them.
LIBRARIES = ("transformers", "diffusers")
#: Room on the disk for an environment, torch without CUDA; and beside it, for what a peer writes.
ENVIRONMENT_NBYTES = 3 << 30
SPARE_NBYTES = 2 << 30


class NoRoomError(Exception):
    """The disk has no room for what is to be written."""


@dataclass(frozen=True)
class Environment:
    """An interpreter to run contestants with; `note` is what is worth telling of how it was made."""

    python: Path
    seconds: float = 0.0
    note: str = ""


def check_disk(folder: Path, nbytes: int, what: str) -> None:
    """Raise NoRoomError unless `nbytes` and some more are free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + SPARE_NBYTES:
        raise NoRoomError(
            f"{folder} has {free / 1e9:.1f} GB free, and {what} takes {nbytes / 1e9:.1f} GB "
            f"beside a reserve of {SPARE_NBYTES / 1e9:.1f} GB; free some space"
        )


@contextmanager
def environment(folder: Path, packages: Sequence[str]) -> Iterator[Environment]:
    """Make an environment with torch, the networks' libraries and `packages`; remove it at the end.

    Without packages it is the one this runs in. Versions are those of constraints.txt where it has them.
    Raises NoRoomError, or RuntimeError with what pip said.
    """
    if not packages:
        yield Environment(Path(sys.executable))
        return
    check_disk(folder.parent, ENVIRONMENT_NBYTES, f"an environment for {', '.join(packages)}")
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    try:
        venv.create(folder, symlinks=True)
        note = _install(folder / "bin" / "python", packages)
        yield Environment(folder / "bin" / "python", time.perf_counter() - begin, note)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(python: Path, packages: Sequence[str]) -> str:
    """Install torch first, alone: nothing that comes after may bring another one."""
    own = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    _pip(python, TORCH)
    _pip(python, *(p for p in own if not p.startswith("torch")), *LIBRARIES)
    try:
        _pip(python, *packages)
    except RuntimeError as error:
        _pip(python, "--no-deps", *packages)
        return f"installed without its dependencies: {error}"
    return ""


def _pip(python: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    constraints = ["--constraint", str(PROJECT / "constraints.txt")]
    done = subprocess.run([*command, *constraints, *what], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError("; ".join(lines)[:300] or done.stderr[-300:])
