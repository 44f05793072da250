"""What a run has made, line by line in its folder's `files.jsonl`: what may be used, and what may be removed.

Each line is on the disk before what it tells of counts. A line that begins a run in place of an earlier one
leaves the names of the earlier to be removed, so a kill in between loses neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from blockstream.errors import ConfigError
from blockstream.system import regular
from blockstream.system.atomic import sync, sync_folder

NAME = "files.jsonl"
SCHEMA = 1
#: Ten thousand prompts with a line for each of their files and saves take a tenth of it.
MAX_NBYTES = 1 << 28


class Made(NamedTuple):
    """What a file was when it was written."""

    nbytes: int
    sha256: str


@dataclass
class Journal:
    """The record of the run in a folder; `begun` is False where there is none.

    `config` and `versions` are what it was begun with, `inputs` what else its bits follow from. `files` and
    `states` are the names it declared, `made` what was written of the files, `left` the names that runs
    before it declared and that are to be removed.
    """

    folder: Path
    begun: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    inputs: dict[str, str | None] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    made: dict[str, Made] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    #: The bytes of the file that are whole lines: what comes after was cut by a kill.
    whole_nbytes: int = 0

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.folder / NAME

    @property
    def names(self) -> set[str]:
        """Return every name that is the run's, or was an earlier one's."""
        return self.files | self.states | self.left

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """Return what a folder's record says; ConfigError for one that cannot be read."""
        journal = cls(folder)
        if not journal.path.is_symlink() and not journal.path.exists():
            return journal
        lines = _lines(journal.path)
        for n, line in enumerate(lines, start=1):
            try:
                journal._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if n == len(lines) > 1:
                    break  # cut by a power cut
                raise ConfigError(
                    f"{journal.path}, line {n}: not the record of a run ({line[:60]!r}); name another --out"
                ) from error
            journal.whole_nbytes += len(line.encode()) + 1
        return journal

    def begin(self, config: Mapping[str, Any], versions: Mapping[str, str | None]) -> None:
        """Begin a run; what was the folder's so far is to be removed."""
        self._write({"schema": SCHEMA, "config": dict(config), "versions": dict(versions)})

    def declare(self, files: Iterable[str], states: Iterable[str] = ()) -> None:
        """Note names that are about to be written. Raises ValueError for one that leaves the folder."""
        new = {"files": sorted(set(files) - self.files), "states": sorted(set(states) - self.states)}
        if any(new.values()):
            self._write(new)

    def note_inputs(self, inputs: Mapping[str, str | None]) -> None:
        """Note what the run's bits follow from beside its config."""
        if dict(inputs).items() - self.inputs.items():
            self._write({"inputs": dict(inputs)})

    def note_versions(self, versions: Mapping[str, str | None]) -> None:
        """Note that the run goes on with other versions."""
        self._write({"versions": dict(versions)})

    def note_made(self, name: str, made: Made) -> None:
        """Note what a file is, before it is moved to its place."""
        self._write({"made": name, "nbytes": made.nbytes, "sha256": made.sha256})

    def note_gone(self, names: Iterable[str]) -> None:
        """Note that files are to count no longer, before they are removed."""
        known = sorted(set(names) & (self.made.keys() | self.left))
        if known:
            self._write({"gone": known})

    def _write(self, line: dict[str, Any]) -> None:
        self._take(line)
        data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
        is_new = not self.path.exists()
        at = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.ftruncate(at, self.whole_nbytes)
            written = 0
            while written < len(data):
                written += os.pwrite(at, data[written:], self.whole_nbytes + written)
            sync(at)
        finally:
            os.close(at)
        self.whole_nbytes += len(data)
        if is_new:
            sync_folder(self.folder)

    def _take(self, line: Any) -> None:
        """Bring what is known up to date with a line."""
        if "schema" in line:
            if line["schema"] != SCHEMA:
                raise ValueError(f"schema {line['schema']}")
            config, versions = dict(line["config"]), dict(line["versions"])
            self.left = self.names
            self.files, self.states, self.made, self.inputs = set(), set(), {}, {}
            self.begun, self.config, self.versions = True, config, versions
        elif not self.begun:
            raise ValueError("the first line begins no run")
        elif "files" in line:
            files, states = (set(map(_inside, line[key])) for key in ("files", "states"))
            self.files |= files
            self.states |= states
            self.left -= files | states
        elif "inputs" in line:
            self.inputs |= dict(line["inputs"])
        elif "versions" in line:
            self.versions = dict(line["versions"])
        elif "made" in line:
            self.made[_inside(line["made"])] = Made(int(line["nbytes"]), str(line["sha256"]))
        else:
            for name in line["gone"]:
                self.made.pop(name, None)
                self.left.discard(name)


def _inside(name: str) -> str:
    """Return a name if it is that of a file in the folder: nothing else is ever removed."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "/" in parts or ".." in parts or str(PurePosixPath(*parts)) != name:
        raise ValueError(f"{name!r} is no path inside the run's folder")
    return name


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a record. One that was never finished counts as none: it told of nothing."""
    try:
        if path.is_symlink():
            raise OSError("is a link")
        data = regular.read_bytes(path, MAX_NBYTES)
    except OSError as error:
        raise ConfigError(f"{path}: not the record of a run ({error}); name another --out") from error
    head = b'{"schema":'
    if b"\n" not in data and (data.startswith(head) or head.startswith(data) or not data.strip(b"\0")):
        return []
    try:
        *lines, rest = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not the record of a run; name another --out") from error
    if not lines:
        raise ConfigError(f"{path}: not the record of a run ({rest[:60]!r}); name another --out")
    return lines
