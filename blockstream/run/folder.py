"""The folder of one run: held, refused when it holds anything else, begun when the run is accepted."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError
from blockstream.report.write import draw_finished
from blockstream.system import regular
from blockstream.system.atomic import LOCK, locked, make_folder, sync_file, sync_folder

from .config import RunConfig
from .files import CONFIG, LEDGER, OWN, PICTURES, REPORT, Files
from .journal import NAME, Journal
from .resume import no_run, resumed

log = logging.getLogger(__name__)

_LEDGERS = re.compile(r"ledger\.\d+\.jsonl")


class RunFolder:
    """One run's folder while it is held; see `run_folder`.

    `is_new`: nothing was in it. Otherwise nothing of it changes before `begin`.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        journal = Journal.read(path)
        if resume and not journal.begun:
            raise no_run(path)
        self.is_new = not journal.begun
        self.begun = self.versions_changed = False
        self._journal, self._resume = journal, resume
        self.files = Files(path, journal, resumed=resume)

    def refuse_others(self, overwrite: bool) -> None:
        """Raise ConfigError for a folder that holds an earlier run, or anything no run has made."""
        found = sorted(p.name for p in self.path.iterdir() if p.name not in (LOCK, NAME))
        foreign = self.files.foreign()
        if overwrite and foreign:
            raise ConfigError(
                f"{self.path} holds what no run has made ({_some(foreign)}); --overwrite removes a run's "
                "files alone: move the others away, or name another --out"
            )
        if not overwrite and (found or not self.is_new):
            more = f" ({_some(found)})" if found else ""
            raise ConfigError(
                f"{self.path} is not empty{more}; go on with --resume {self.path}, "
                "replace it with --overwrite, or name another --out"
            )

    def resumed(self, config: RunConfig, versions: Mapping[str, str | None]) -> RunConfig:
        """Return a config with the numerics of the run that is gone on with; refuse another's.

        With other versions than the run was begun with, nothing half done is used: that is said.
        """
        config = resumed(config, self._journal.config, self.path)
        changed = {k: v for k, v in versions.items() if self._journal.versions.get(k, v) != v}
        for name, version in changed.items():
            log.warning(
                "%s was begun with %s %s and goes on with %s: what was half done is done again, and the last "
                "bits of the rest may differ from those of a run that was never stopped",
                *(self.path, name, self._journal.versions[name], version),
            )
        if changed:
            self.versions_changed = True
            self.files.forget_states()
        return config

    def finished(self) -> dict[str, Any] | None:
        """Return the report of a run whose files are all there and whole, None while something is left."""
        if not self.files.is_whole(REPORT):
            return None
        try:
            report = regular.read_json(self.path / REPORT)
            files = [str(name) for name in report["output"]["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        kept = {*files, *self._journal.files} - set(OWN)
        kept -= {name for name in kept if _LEDGERS.fullmatch(name)}
        return dict(report) if files and all(self.files.is_whole(name) for name in sorted(kept)) else None

    def tidy(self, config: RunConfig) -> None:
        """Leave a finished run's folder with all that belongs in it, and nothing that a kill left."""
        self.files.accept(*OWN)
        if not (self.path / CONFIG).is_file():
            self.files.write(CONFIG, config.dump().encode())
        if not all((self.path / name).is_file() for name in PICTURES):
            draw_finished(self.path)

    def begin(self, config: RunConfig, versions: Mapping[str, str | None]) -> None:
        """Begin to write: the run is accepted. What an earlier run left goes; a ledger is kept."""
        if not self._resume:
            self._journal.begin(config.resolved(), versions)
        elif self.versions_changed:
            self.files.drop_states()
            self._journal.note_versions(versions)
        self.files.accept(*OWN)
        if self._resume:
            self.files.remove([REPORT])
            self._keep_ledger()
        self.files.write(CONFIG, config.dump().encode())

    def forget(self) -> None:
        """Remove what a run wrote that failed before it computed, its record last."""
        self.files.remove(self._journal.names)
        self._journal.path.unlink(missing_ok=True)

    def _keep_ledger(self) -> None:
        """Set the ledger of the run so far aside, as ledger.1.jsonl, ledger.2.jsonl, ..."""
        ledger = self.path / LEDGER
        if not ledger.is_file() or ledger.stat().st_size == 0:
            return
        n = 1
        while (kept := self.path / f"ledger.{n}.jsonl").exists():
            n += 1
        self.files.declare([kept.name])
        sync_file(ledger)
        ledger.rename(kept)
        sync_folder(self.path)


def write_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Write report.json: with it the run is done."""
    folder.files.write(REPORT, (json.dumps(report, indent=1) + "\n").encode())


@contextmanager
def run_folder(path: Path, resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Make and hold a run's folder for the length of the block.

    When the block fails before `begun` is set, what a new run wrote goes, and the folder if it was made for
    it. Raises ConfigError for a folder that is in use, or that is not what `resume` and `overwrite` need.
    """
    if resume and not path.is_dir():
        raise ConfigError(f"{path} does not exist; --resume goes on with the run in a folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; name a folder with --out")
    made = not path.exists()
    make_folder(path)
    try:
        with locked(path):
            folder = RunFolder(path, resume)
            if not resume:
                folder.refuse_others(overwrite)
            try:
                yield folder
            except BaseException:
                if folder.is_new and not folder.begun:
                    folder.forget()
                raise
    except BaseException:
        if made and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
