"""Read a sharded checkpoint's index: which file holds which tensor. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .entries import unreadable
from .foreign import name_foreign

#: An index lists names only; one longer than this is damage.
MOST_INDEX_NBYTES = 100_000_000


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return JSON pairs as a table; ValueError for a key that occurs twice."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} occurs twice")
        table[key] = value
    return table


def read_json(path: Path) -> Any:
    """Return the value of a small JSON file; CheckpointError names the file and the cause."""
    try:
        return parsed(regular.read_text(path, MOST_INDEX_NBYTES), path)
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); fetch it again") from error


def parsed(text: str, path: Path) -> Any:
    """Return the value of JSON that a path holds; raises as `read_json`."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        name_foreign(path, text[:64].encode())
        raise CheckpointError(f"{path}: is not JSON ({error}); fetch it again") from error


def safe_name(name: Any, named_in: Path) -> str:
    """Return a file name that an index or manifest gives, refused if it leaves the folder.

    Absolute paths, drives and `..` are refused; a symlink of that name may point anywhere, as those
    of the Hugging Face cache do, since it is the user's own file system that says so.
    """
    if isinstance(name, str) and name and "\0" not in name:
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        outside = posix.is_absolute() or windows.drive or windows.root
        if not outside and ".." not in posix.parts and ".." not in windows.parts:
            return name
    raise CheckpointError(
        f"{named_in}: names the file {name!r}; only files inside its own folder are read: "
        "fetch the checkpoint again from a source you trust"
    )


def read_index(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Return tensor name -> shard of a `*.index.json`, each shard beside the index.

    Raises CheckpointError for an index that is not one, or that names files outside its folder.
    """
    path = Path(path)
    return {tensor: path.parent / name for tensor, name in weight_map(read_json(path), path).items()}


def weight_map(value: Any, path: Path) -> dict[str, str]:
    """Return tensor name -> name of its shard, of the value of an index; raises as `read_index`."""
    table = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path}: has no table weight_map of tensors and files; fetch it again")
    return {tensor: safe_name(name, path) for tensor, name in table.items()}
