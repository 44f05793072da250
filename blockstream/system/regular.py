"""The one door to files that a user or a file names: regular ones alone, no larger than their reader expects.

A FIFO, a socket or a terminal would wait for ever, `/dev/zero` would never end, and opening a device can do
something. So a file's kind is asked before it is opened and again of what was opened.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

#: The most that a JSON or text file beside weights may have: an index of 10^5 tensors has ten megabytes.
MOST_TEXT_NBYTES = 100_000_000
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FileRefusedError(OSError):
    """A file that is not opened because of its kind or its size; its text says which."""

    def __init__(self, code: int, said: str, path: str | os.PathLike[str]) -> None:
        super().__init__(code, said, os.fspath(path))

    def __str__(self) -> str:
        return str(self.strerror)


def check(path: str | os.PathLike[str], most: int | None = None) -> os.stat_result:
    """Return the `stat` of a regular file of at most `most` bytes; links are followed, nothing is opened.

    For files that a library opens by their names. Raises OSError, and FileRefusedError for another kind.
    """
    found = os.stat(path)
    _check(path, found, most)
    return found


def descriptor(path: str | os.PathLike[str], flags: int = 0) -> int:
    """Return a descriptor of a regular file open for reading; raises as `check`.

    `flags` are those of os.open beside reading. Never waits: a file exchanged for a FIFO after the check
    is opened without blocking, found out and closed.
    """
    check(path)
    never_waits = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    opened_as = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | never_waits | flags)
    try:
        _check(path, os.fstat(opened_as), None)
    except BaseException:
        os.close(opened_as)
        raise
    return opened_as


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a regular file open for reading bytes; raises as `check`."""
    return os.fdopen(descriptor(path), "rb")


def read_bytes(path: str | os.PathLike[str], most: int = MOST_TEXT_NBYTES) -> bytes:
    """Return all of a regular file of at most `most` bytes; raises as `check`, before it reads."""
    with opened(path) as file:
        _check(path, os.fstat(file.fileno()), most)
        data = file.read(most + 1)  # the system's own files have no size beforehand
    if len(data) > most:
        raise _too_large(path, len(data), most)
    return data


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT_NBYTES) -> str:
    """Return a UTF-8 text file; raises as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: str | os.PathLike[str], most: int = MOST_TEXT_NBYTES) -> Any:
    """Return the value of a JSON file; raises as `read_text`, and ValueError for what is no JSON."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _check(path: str | os.PathLike[str], found: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EPERM
        raise FileRefusedError(code, f"is {kind}; only regular files are read", path)
    if most is not None and found.st_size > most:
        raise _too_large(path, found.st_size, most)


def _too_large(path: str | os.PathLike[str], nbytes: int, most: int) -> FileRefusedError:
    said = f"has {nbytes:,} bytes or more, at most {most:,} are read"
    return FileRefusedError(errno.EFBIG, said, path)
