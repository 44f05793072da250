"""The folder of the page's runs: a folder each, and beside it what was asked for and what became of it.

out/web/0001/                 the run's folder, as `blockstream run --out` writes it
out/web/0001.json             its record: preset, settings, state
out/web/0001.yaml, 0001.png   its config, and the image that was uploaded for it
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blockstream.errors import ConfigError
from blockstream.system import regular
from blockstream.system.atomic import write_atomic, write_json

State = Literal["waiting", "running", "stopping", "stopped", "failed", "done"]

#: What the page calls a run by; nothing else is looked for on the disk.
ID = re.compile(r"[0-9]{4,8}")
#: The results that are shown.
SHOWN = {".mp4": "video/mp4", ".png": "image/png"}
_PICTURES = frozenset({"timeline.png", "compare.png"})
#: A record is a page of text.
MOST_RECORD_NBYTES = 4 << 20


@dataclass(frozen=True)
class Record:
    """One run of the page. `asked` is what the page sent; `upload` the name of its image's file."""

    id: str
    preset: str
    asked: Mapping[str, Any]
    state: State = "waiting"
    made_at: float = field(default_factory=time.time)
    error: str = ""
    upload: str = ""

    @property
    def is_open(self) -> bool:
        """Return whether it waits or runs."""
        return self.state in ("waiting", "running", "stopping")


class Shelf:
    """The records of a folder, newest last; every change is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self._figures: dict[str, tuple[int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            if ID.fullmatch(path.stem) and (record := _read(path)) is not None:
                self.records[record.id] = replace(record, state="stopped") if record.is_open else record

    def get(self, name: str) -> Record:
        """Return the record of that name. Raises KeyError where there is none."""
        return self.records[name]

    def next_id(self) -> str:
        """Return a name that nothing in the folder has."""
        taken = [int(found[0]) for p in self.folder.iterdir() if (found := ID.match(p.name))]
        return f"{max(taken, default=0) + 1:04d}"

    def put(self, record: Record) -> Record:
        """Keep a record in place of an earlier one of its name."""
        write_json(self._beside(record.id, ".json"), asdict(record))
        self.records[record.id] = record
        return record

    def set_config(self, name: str, text: str) -> None:
        """Write the config that a run is begun with."""
        write_atomic(self.config_of(name), text.encode())

    def config_of(self, name: str) -> Path:
        """Return the path of a run's config."""
        return self._beside(name, ".yaml")

    def run_folder(self, name: str) -> Path:
        """Return the folder that a run writes."""
        return self.folder / name

    def is_begun(self, name: str) -> bool:
        """Return whether a run has left something to go on with."""
        return (self.run_folder(name) / "files.jsonl").is_file()

    def remove(self, name: str) -> None:
        """Remove a run that is not open, and all that lies beside it, its record last."""
        record = self.get(name)
        if record.is_open:
            raise ConfigError(f"run {name} is {record.state}; stop it first")
        shutil.rmtree(self.run_folder(name), ignore_errors=True)
        for path in (
            self.folder / (record.upload or ".none"),
            self.config_of(name),
            self._beside(name, ".json"),
        ):
            path.unlink(missing_ok=True)
        del self.records[name]

    def results(self, name: str) -> list[str]:
        """Return the videos and pictures that a run has made so far, as paths in its folder."""
        folder = self.run_folder(name)
        found = [
            p.relative_to(folder)
            for suffix in SHOWN
            for p in (*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}"))
        ]
        return sorted(p.as_posix() for p in found if p.name not in _PICTURES)

    def result(self, name: str, path: str) -> Path | None:
        """Return the file of a result by its path in a run's folder; None for anything else."""
        if path not in self.results(name):
            return None
        found = self.run_folder(name) / path
        inside = found.resolve().is_relative_to(self.run_folder(name).resolve())
        return found if inside and found.is_file() else None

    def figures(self, name: str) -> dict[str, Any]:
        """Return what a finished run's report says that the gallery shows; nothing where there is none."""
        path = self.run_folder(name) / "report.json"
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return {}
        if self._figures.get(name, (0, {}))[0] != changed:
            self._figures[name] = changed, _figures(path)
        return self._figures[name][1]

    def _beside(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"


def _figures(path: Path) -> dict[str, Any]:
    """Return what a report says that the gallery shows."""
    try:
        report = regular.read_json(path)
        budget, sampler = report["budget"], report.get("sampler") or {}
        return {
            "wall_s": float(report["wall_s"]),
            "peak_nbytes": int(budget["peak_nbytes"]),
            "budget_nbytes": int(budget["nbytes"]),
            "held": bool(budget["held"]),
            "passes": [sampler.get("passes"), sampler.get("of")],
            "prompts": [str(p) for p in report.get("output", {}).get("prompts", [])],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read(path: Path) -> Record | None:
    """Return the record in a file; None for one that is none."""
    with suppress(OSError, ValueError, TypeError):
        found = json.loads(regular.read_bytes(path, MOST_RECORD_NBYTES))
        record = Record(**found)
        names = (record.id == path.stem, not record.upload or record.upload.startswith(f"{record.id}."))
        if all(names) and "/" not in record.upload and isinstance(record.asked, dict):
            return record
    return None


def newest_first(shelf: Shelf) -> Iterator[Record]:
    """Yield the records of a shelf, the newest first."""
    for name in sorted(shelf.records, key=int, reverse=True):
        yield shelf.records[name]
