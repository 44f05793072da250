"""The files of a run: declared, saved so that a power cut loses none, checked before they are used again.

A pipeline declares what it will write and asks for the rest: `run.files.is_whole(name)` whether there is
anything left to do, `writing` and `write` for results, `save` and `load` for what a resumed run goes on from.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from blockstream.errors import CheckpointError, ConfigError, EngineError
from blockstream.system.atomic import (
    LOCK,
    make_folder,
    replaced,
    sha256_of,
    sync_file,
    sync_folder,
    unfinished,
)

from .journal import NAME, Journal, Made

log = logging.getLogger(__name__)

#: The folder of what a run goes on from; gone when the run is done.
STATE = "state"

#: What the engine writes of every run: PICTURES are made anew from the ledger at any time.
CONFIG, LEDGER, REPORT = "config.yaml", "ledger.jsonl", "report.json"
PICTURES = ("report.html", "timeline.png", "trace.json")
OWN = (CONFIG, LEDGER, REPORT, *PICTURES)


class Files:
    """The files of one run, by names relative to its folder. Used by the thread that computes.

    Nothing is written before `accept`; what is declared until then is noted with it. With `resumed` False
    nothing that lies in the folder counts.
    """

    def __init__(self, folder: Path, journal: Journal | None = None, resumed: bool = False) -> None:
        self.folder = folder
        self.resumed = resumed
        self._journal = Journal(folder) if journal is None else journal
        self._waiting: tuple[set[str], set[str]] | None = (set(), set())
        self._inputs: dict[str, str | None] = {}
        #: The files found or made whole, and the states saved, by this process.
        self._checked: set[str] = set()
        self._saved: set[str] = set()
        self._stale = False
        #: Whether a state with numbers that are not finite is as good as damaged.
        self.finite = True

    # -- what a pipeline calls ---------------------------------------------------------------

    def declare(self, files: Iterable[str], states: Iterable[str] = ()) -> None:
        """Say what the run will write: files that stay, and states, which go when the run is done.

        Names are relative to the run's folder, with "/"; a state is saved and loaded by its bare name.
        """
        kept, passing = {_inside(name) for name in files}, {_inside(_state(name)) for name in states}
        if taken := sorted(kept & {*OWN, NAME, LOCK}):
            raise EngineError(f"{taken[0]} is written by the engine; choose another name")
        self._declare(kept, passing)

    def _declare(self, kept: set[str], passing: set[str]) -> None:
        if self._waiting is None:
            self._journal.declare(kept, passing)
        else:
            self._waiting[0].update(kept)
            self._waiting[1].update(passing)

    def is_whole(self, name: str) -> bool:
        """Return whether a file is there and is, byte for byte, what the run wrote; said where it is not."""
        made = self._journal.made.get(name)
        if not self.resumed or made is None:
            return False
        if name in self._checked:
            return True
        path = self.folder / name
        try:
            found = Made(path.lstat().st_size, sha256_of(path))
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s cannot be read and is made again: %s", path, error)
            return False
        if found != made:
            log.warning("%s is not what the run wrote and is made again", path)
            return False
        self._checked.add(name)
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a path to write a declared file to; it counts, whole and synced, when the block ends well."""
        path = self._place(name)
        with replaced(path) as temporary:
            yield temporary
            sync_file(temporary)
            # First the record: a file that is in its place and of which nothing is known would be made again.
            self._journal.note_made(name, Made(temporary.stat().st_size, sha256_of(temporary)))
        self._checked.add(name)

    def write(self, name: str, data: bytes) -> None:
        """Write a declared file, all or nothing."""
        with self.writing(name) as temporary:
            temporary.write_bytes(data)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that the run, or one before it, has declared."""
        chosen = sorted(set(names) & self._journal.names)
        self._journal.note_gone(set(chosen) - self._journal.left)
        for name in chosen:
            _refuse_links(self.folder, name)
            unfinished(self.folder / name).unlink(missing_ok=True)
            (self.folder / name).unlink(missing_ok=True)
        self._journal.note_gone(chosen)
        self._checked.difference_update(chosen)
        for parent in sorted({Path(name).parent for name in chosen} - {Path()}, reverse=True):
            while parent != Path():
                if not _is_emptied(self.folder / parent):
                    break
                parent = parent.parent

    def save(self, name: str, tree: Mapping[str, Any]) -> None:
        """Save a declared state, all or nothing: tensors, numbers and None, in mappings and lists.

        Raises ConfigError naming what is none of these.
        """
        from blockstream.module.states import packed

        file = _state(name)
        with replaced(self._place(file)) as temporary:
            packed(tree, name, temporary)
        self._saved.add(name)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return a state as it was saved; None, and said, where there is none or it is damaged."""
        from blockstream.module.states import unpacked

        path = self.folder / _state(name)
        earlier = self.resumed and not self._stale and _state(name) in self._journal.states
        known = name in self._saved or earlier
        if not known or not path.exists():
            return None
        try:
            return unpacked(path, name, self.finite)
        except CheckpointError as error:
            log.warning("%s; what it held is made again", error)
            return None

    def drop(self, name: str) -> None:
        """Remove a state that is not needed any more."""
        path = self.folder / _state(name)
        _refuse_links(self.folder, _state(name))
        path.unlink(missing_ok=True)

    # -- what the engine calls ---------------------------------------------------------------

    def identify(self, inputs: Mapping[str, str | None]) -> None:
        """Note what the run's bits follow from beside its config; refuse a resumed run where that changed."""
        was = self._journal.inputs if self.resumed else {}
        changed = [name for name, value in inputs.items() if was.get(name, value) != value]
        if changed:
            raise ConfigError(
                f"{self.folder} was begun with another {', another '.join(changed)}: its rest would not "
                "belong to its beginning; put the old one back, or start again with --overwrite"
            )
        self._inputs |= inputs
        if self._waiting is None:
            self._journal.note_inputs(self._inputs)

    @property
    def identified(self) -> frozenset[str]:
        """Return the names of what the run has been identified by."""
        return frozenset(self._inputs)

    def begin(self, config: Mapping[str, Any], versions: Mapping[str, str | None]) -> None:
        """Begin a run in the folder: what was its so far goes."""
        self._journal.begin(config, versions)
        self.accept()

    def accept(self, *more: str) -> None:
        """Begin to write: what was declared, and `more`, is noted; what a kill left half written goes."""
        if self._waiting is None:
            self._declare(set(more), set())
            return
        self.remove(self._journal.left)
        for name in self._journal.names:
            path = unfinished(self.folder / name)
            if path.is_file() and not path.is_symlink():
                _refuse_links(self.folder, name)
                path.unlink()
        (files, states), self._waiting = self._waiting, None
        self._journal.declare({*files, *more}, states)
        self._journal.note_inputs(self._inputs)

    def adopt(self, name: str) -> None:
        """Count a file that a pipeline has written by itself, once it is on the disk."""
        path = self.folder / _inside(name)
        if name in self._checked or path.is_symlink() or not path.is_file():
            return
        sync_file(path)
        sync_folder(path.parent)
        self.declare([name])
        self._journal.note_made(name, Made(path.stat().st_size, sha256_of(path)))

    def forget_states(self) -> None:
        """Let no state of before count: other versions made it."""
        self._stale = True

    def drop_states(self) -> None:
        """Remove every state: what they served is done, or no longer theirs to serve."""
        self.remove(self._journal.states)

    def foreign(self) -> list[str]:
        """Return what lies in the folder and no run of its record has declared."""
        own = self._journal.names
        known = {NAME, LOCK, *own, *(str(unfinished(Path(name))) for name in own)}
        parents = {str(parent) for name in own for parent in Path(name).parents}
        return sorted(_foreign(self.folder, Path(), known, parents))

    def _place(self, name: str) -> Path:
        """Return where a declared file goes; its folder is made."""
        if self._waiting is not None:
            raise EngineError(f"{name} is written before the run has begun; write in run(), not in declare()")
        if name not in self._journal.files | self._journal.states:
            raise EngineError(f"{name} was not declared; name it in run.files.declare() first")
        _refuse_links(self.folder, name)
        path = self.folder / name
        make_folder(path.parent)
        return path


def _inside(name: str) -> str:
    """Return a name that stays in the run's folder. Raises EngineError for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or str(path) != name or ".." in path.parts or path.parts[:1] in ((), ("",)):
        raise EngineError(
            f"{name!r} is no name of a run's file: write one relative to its folder, with / and without .."
        )
    return name


def _state(name: str) -> str:
    return f"{STATE}/{name}.safetensors"


def _refuse_links(folder: Path, name: str) -> None:
    """Raise ConfigError where the way to a file leads through a link: what it names is not the run's."""
    for parent in list(Path(name).parents)[:-1]:
        if (folder / parent).is_symlink():
            raise ConfigError(f"{folder / parent} is a link; nothing is written or removed through one")


def _is_emptied(path: Path) -> bool:
    """Remove a folder if nothing is in it."""
    try:
        path.rmdir()
    except OSError:
        return not path.exists()
    return True


def _foreign(folder: Path, at: Path, known: set[str], parents: set[str]) -> Iterator[str]:
    for path in (folder / at).iterdir():
        name = at / path.name
        if path.is_dir() and not path.is_symlink():
            if str(name) in parents:
                yield from _foreign(folder, name, known, parents)
            else:
                yield f"{name}/"
        elif str(name) not in known:
            yield str(name)


def results_of(output: Any) -> list[str]:
    """Return the files that a pipeline says it has made. Raises TypeError for what says nothing of it."""
    if not isinstance(output, Mapping):
        raise TypeError(f"run() returned {reprlib.repr(output)}, expected a mapping")
    json.dumps(output)
    found = output.get("files", ())
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"run() returned files {reprlib.repr(found)}, expected a list of names")
    return list(found)
