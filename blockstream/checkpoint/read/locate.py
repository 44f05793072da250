"""Where on this machine a checkpoint's path leads: `~`, links, hub ids in the local cache; no network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular

#: A hub id: an organisation and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file or folder that is there.

    Raises ConfigError for what is no path, and CheckpointError for one that is not there: naming where a
    link points, or how to fetch a hub's model.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(f"{path!r:.80} is no path; name the file or folder of a model or its weights")
    there = Path(path).expanduser()
    if there.exists():
        return there
    if there.is_symlink():
        raise CheckpointError(
            f"{there}: is a link to {os.readlink(there)}, which is not there; fetch the files again, or mend "
            "the link"
        )
    name = os.fspath(path)
    if _HUB_ID.fullmatch(name):
        return _cached(name)
    raise CheckpointError(f"{path}: there is no such file or folder; check the path")


def hub_cache() -> Path:
    """Return the folder of the hub's cache, as its own library finds it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached(name: str) -> Path:
    """Return the snapshot of a hub's model that the local cache has."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = regular.read_text(folder / "refs" / "main", 1000).strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    snapshot = folder / "snapshots" / revision
    if revision and revision not in (".", "..") and os.sep not in revision and snapshot.is_dir():
        return snapshot
    raise CheckpointError(
        f"{name}: there is no such file or folder, nor a model of that name in the local cache "
        f"({folder.parent}); nothing is downloaded: fetch it first with `hf download {name}`"
    )
