"""The folder of a run: locked, refused when it holds something, written so that a kill loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from blockstream.errors import ConfigError

#: What a run writes, and so what --overwrite may remove; folders are those of several prompts.
FILES = (
    "video.mp4",
    "image.png",
    "latents.safetensors",
    "report.json",
    "ledger.jsonl",
    "config.yaml",
    "report.html",
    "timeline.png",
    "trace.json",
)
#: Ledgers of the parts of a resumed run, and what a kill leaves half written.
_OTHERS = re.compile(r"ledger\.\d+\.jsonl|(?P<unfinished>\..+\.(part|\d+))")
LOCK = ".lock"
STATE = "state"


class OutputFolder:
    """One run's folder, made and locked for the length of a `with` block.

    When the block fails before `begun` is set, what it wrote goes, and the folder if it was made for it.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self._resume = resume
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made = False
        self.begun = resume

    def __enter__(self) -> OutputFolder:
        if self._resume and not self.path.is_dir():
            raise ConfigError(f"{self.path} does not exist; --resume goes on with the run in a folder")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; name a folder with --out")
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._make_room()
        except BaseException:
            self._drop_lock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.begun:
            for name in ("config.yaml", "ledger.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        self._drop_lock()
        if error is not None and self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def _take_lock(self) -> None:
        import fcntl

        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ConfigError(
                f"{self.path} is being written by another run; wait for it or name another --out"
            ) from error
        self._lock = lock

    def _drop_lock(self) -> None:
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _make_room(self) -> None:
        found = sorted(p.name for p in self.path.iterdir() if p.name != LOCK)
        if self._resume:
            self._remove_unfinished(found)
        if not found or self._resume:
            return
        if not self._overwrite:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"{self.path} is not empty ({', '.join(found[:3])}{more}); go on with --resume {self.path}, "
                "replace it with --overwrite, or name another --out"
            )
        for name in found:
            path = self.path / name
            if path.is_dir():
                if name == STATE or _is_of_a_prompt(path):
                    shutil.rmtree(path)
            elif _is_written(name):
                path.unlink()

    def _remove_unfinished(self, found: list[str]) -> None:
        """Remove the files that a kill left half written; nobody else writes here while it is locked."""
        own = [self.path / name for name in found if name == STATE or _names_a_prompt(name)]
        for path in [p for folder in [self.path, *own] if folder.is_dir() for p in folder.iterdir()]:
            match = _OTHERS.fullmatch(path.name)
            if match is not None and match["unfinished"] and path.is_file():
                path.unlink()


def _is_written(name: str) -> bool:
    """Return whether a file's name is one that a run writes."""
    return name in FILES or _OTHERS.fullmatch(name) is not None


def _names_a_prompt(name: str) -> bool:
    """Return whether a name is 0000, 0001, ..."""
    return name.isdigit() and len(name) == 4


def _is_of_a_prompt(path: Path) -> bool:
    """Return whether a folder is a prompt's and holds nothing a run does not write."""
    return _names_a_prompt(path.name) and all(_is_written(p.name) for p in path.iterdir())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())
