"""The folder of what can be made again, and small facts kept in it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from . import regular
from .atomic import write_json


def cache_folder() -> Path:
    """Return the folder of what can be made again: BLOCKSTREAM_CACHE, else the user's cache."""
    if named := os.environ.get("BLOCKSTREAM_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/blockstream"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "blockstream"
    # The XDG specification has relative paths ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "blockstream"


def cached(file: Path) -> int | None:
    """Return the bytes that were kept in a file, None for whatever is no such file."""
    try:
        nbytes = regular.read_json(file)["nbytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return nbytes if type(nbytes) is int and nbytes > 0 else None


def write_cached(file: Path, value: object) -> None:
    """Write JSON so that a reader sees all of it or nothing; a folder that refuses is let be."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value, unique=True)
