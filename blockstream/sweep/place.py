"""Where a sweep's results are: a folder of this machine, or a URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from blockstream.errors import ConfigError
from blockstream.system import regular
from blockstream.system.atomic import write_atomic

#: A file of a sweep's own is no larger.
MOST_NBYTES = 1 << 30


class Place:
    """Files by name under a folder or URL; names have "/" between their parts.

    Raises ConfigError for a URL whose protocol is unknown, or whose package is not installed.
    """

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/") or where
        try:
            fs, root = url_to_fs(where)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{where}: {error}; name a folder, or a URL that fsspec can open") from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    @property
    def folder(self) -> Path | None:
        """Return the folder on this machine's file system; None for one elsewhere."""
        return Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    @property
    def is_shared(self) -> bool:
        """Return whether another process finds there what this one writes."""
        protocol = self._fs.protocol
        return "memory" not in ([protocol] if isinstance(protocol, str) else protocol)

    def read(self, name: str) -> bytes | None:
        """Return what a file holds, None where there is none."""
        try:
            if (folder := self.folder) is not None:
                return regular.read_bytes(folder / name, MOST_NBYTES)
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, all or nothing."""
        if (folder := self.folder) is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data, unique=True)
            return
        self._made(name)
        self._fs.pipe_file(self._path(name), data)

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, relative to it, in order."""
        below = self._path(folder)
        try:
            found = self._fs.find(below)
        except FileNotFoundError:
            return []
        return sorted(str(path)[len(below) :].lstrip("/") for path in found)

    def put(self, path: Path, name: str) -> None:
        """Copy a file of this machine there."""
        self._made(name)
        self._fs.put_file(str(path), self._path(name))

    def fetch(self, folder: str, to: Path) -> None:
        """Copy all files below a folder to one on this machine."""
        for name in self.names(folder):
            path = to / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._path(f"{folder}/{name}"), str(path))

    def remove(self, names: list[str]) -> None:
        """Remove files; one that is gone is let pass."""
        for name in names:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _made(self, name: str) -> None:
        """Make the folder of a file, where the place has folders."""
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
