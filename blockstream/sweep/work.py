"""One task of a sweep, wherever it runs: the run is made, or gone on with, and told in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.errors import BlockstreamError, ConfigError
from blockstream.system.atomic import locked

from .mirror import EVERY_S, REPORT, Mirror
from .place import Place
from .tasks import Task

if TYPE_CHECKING:
    from blockstream.run.config import RunConfig

#: How long a run waits for its folder: what a dead machine began may compute on until it notices.
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Work:
    """What is done with every task of a sweep. Pickled to where it is done.

    `configs` are the resolved configs of the grid's cells, as YAML; `key` is the pipeline's key for prompts:
    "prompts", or "prompt" where it takes one. `every_s` is how often a run that is kept elsewhere is copied.
    """

    where: str
    configs: tuple[str, ...]
    key: str
    every_s: float = EVERY_S
    patience_s: float = PATIENCE_S

    def __call__(self, task: Task) -> dict[str, Any]:
        """Make a run, or go on with what is there of it; return its line. A failure is a line too."""
        line = {"run": task.name, "first": task.first, "cell": task.cell, "prompts": list(task.prompts)}
        try:
            return {**line, **self._made(task)}
        except BlockstreamError as error:
            return {**line, "error": str(error)}
        except Exception as error:
            return {**line, "error": f"{type(error).__name__}: {error}"}

    def _made(self, task: Task) -> dict[str, Any]:
        place = Place(self.where)
        if place.folder is not None:
            folder = place.folder / task.name
            return _told(self._run(task, folder), task.name, _parts(folder))
        if (done := place.read(f"{task.name}/{REPORT}")) is not None:
            return _told(json.loads(done), task.name, _parts_of(place.names(task.name)))
        folder = scratch(self.where) / task.name
        if not folder.exists():
            folder.mkdir(parents=True)
            place.fetch(task.name, folder)
        mirror = Mirror(folder, place, task.name, self.every_s)
        report = self._run(task, folder, mirror)
        mirror.finish()
        told = _told(report, task.name, _parts(folder))
        shutil.rmtree(folder, ignore_errors=True)
        return told

    def _run(self, task: Task, folder: Path, *observers: object) -> Mapping[str, Any]:
        from blockstream.run import runner
        from blockstream.run.journal import Journal

        folder.mkdir(parents=True, exist_ok=True)
        until_free(folder, self.patience_s)
        resume = Journal.read(folder).begun
        config = config_for(self.configs[task.cell], self.key, task.prompts)
        return runner.run(config, folder, resume=resume, observers=observers)


def config_for(text: str, key: str, prompts: tuple[str, ...]) -> RunConfig:
    """Return a config, resolved but for its prompts, with some; ConfigError where they are refused."""
    from blockstream.run.config import make_config
    from blockstream.run.yamlfile import parse

    document = parse(text, "the sweep's config")
    given = list(prompts) if key == "prompts" else prompts[0]
    return make_config(replace(document, data={**document.data, key: given}))


def scratch(where: str) -> Path:
    """Return the folder of this machine where runs compute that are kept elsewhere; only its owner's.

    Raises ConfigError where somebody else has made it.
    """
    digest = hashlib.sha256(where.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"blockstream-sweep-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} is somebody else's; remove it, or name another TMPDIR")
    return folder


def until_free(folder: Path, patience_s: float, pause: Callable[[float], None] = time.sleep) -> None:
    """Return once nobody holds a run's folder. Raises ConfigError naming it after so many seconds."""
    end = time.monotonic() + patience_s
    while True:
        try:
            with locked(folder):
                return
        except ConfigError:
            if time.monotonic() >= end:
                raise
        pause(0.2)


def _told(report: Mapping[str, Any], name: str, parts: int) -> dict[str, Any]:
    """Return what a sweep keeps of a run's report."""
    budget, disk = report.get("budget") or {}, report.get("disk") or {}
    files = (report.get("output") or {}).get("files") or []
    return {
        "files": [f"{name}/{file}" for file in files],
        "parts": parts,
        "wall_s": report.get("wall_s"),
        "read_nbytes": disk.get("read_nbytes"),
        "peak_nbytes": budget.get("peak_nbytes"),
        "held": budget.get("held"),
    }


def _parts(folder: Path) -> int:
    return _parts_of([path.name for path in folder.glob("ledger*.jsonl")])


def _parts_of(names: list[str]) -> int:
    """Return in how many parts a run was made: each left a ledger."""
    return max(1, sum(name.startswith("ledger") and name.endswith(".jsonl") for name in names))
