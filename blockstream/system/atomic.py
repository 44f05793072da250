"""Files that appear whole or not at all, also after a power cut, and a folder that one process holds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

from blockstream.errors import ConfigError

from . import regular

#: Held where a filesystem cannot lock the folder itself.
LOCK = ".lock"

_PIECE = 1 << 20


def unfinished(path: Path) -> Path:
    """Return the path that a file is written at before it is moved to its place."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replaced(path: Path, unique: bool = False) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well, that file is synced and moved to `path`.

    A failure leaves what was there before, and nothing beside it; after a kill what stays is
    `unfinished(path)`, which the next attempt replaces. `unique` is for folders that several processes write
    to at once.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}") if unique else unfinished(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the folder may be gone, or no longer ours to write
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, unique: bool = False) -> None:
    """Write a file so that a reader, or a run after a kill, sees all of it or what was there before."""
    with replaced(path, unique) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, unique: bool = False) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(path, json_bytes(value), unique)


def json_bytes(value: Any) -> bytes:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=1).encode() + b"\n"


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each on the disk before it is used."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def move(source: Path, target: Path) -> None:
    """Move a folder that is whole to where nothing lies, on the same disk; all below it is synced first."""
    for at, _, names in os.walk(source, topdown=False):
        for name in names:
            sync_file(Path(at, name))
        sync_folder(Path(at))
    source.rename(target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Return when a file's bytes are on the disk."""
    at = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(at)
    finally:
        os.close(at)


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk; a filesystem that cannot say so is let pass."""
    with suppress(OSError):
        sync_file(path)


def sync(descriptor: int) -> None:
    """Sync an open file; macOS needs more than `fsync` for what a power cut must not lose."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hash of a regular file; OSError for anything else, a link included."""
    with open(regular.descriptor(path, os.O_NOFOLLOW), "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for the length of the block: nobody else who asks so gets it.

    The folder itself is locked, so that removing a file in it lets nobody in. Raises ConfigError where
    another process holds it.
    """
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(at)
        raise _in_use(folder) from error
    except OSError:  # some network filesystems lock files only
        os.close(at)
        with _lock_file(folder):
            yield
        return
    try:
        yield
    finally:
        os.close(at)


@contextmanager
def _lock_file(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    while True:
        at = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have removed the file in between: then this is the lock of no folder any more.
            if path.exists() and os.path.samestat(os.fstat(at), path.stat()):
                break
            os.close(at)
        except OSError as error:
            os.close(at)
            raise _in_use(folder) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(at)


def _in_use(folder: Path) -> ConfigError:
    return ConfigError(f"{folder} is being written by another run; wait for it or name another --out")
