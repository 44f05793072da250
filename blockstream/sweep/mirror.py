"""A run that computes on this machine and is kept elsewhere: enough of it, all along, to go on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from blockstream.plugins import hookimpl

from .place import Place

log = logging.getLogger(__name__)

REPORT = "report.json"
#: States that a run goes on from; none is needed once it is done.
STATE = "state/"
#: What a run goes on without: it is copied at the end.
_AT_THE_END = ("ledger.jsonl", "report.html", "timeline.png", "trace.json", REPORT)
EVERY_S = 60.0


class Mirror:
    """An observer that copies what has changed in a run's folder, at the end of a pass, every so often.

    A copy that fails is said, and tried again the next time. Used by the thread that computes.
    """

    def __init__(
        self,
        folder: Path,
        place: Place,
        name: str,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.place, self.name = folder, place, name
        self.every_s, self._clock = every_s, clock
        self._last_s = clock()
        self._seen: dict[str, tuple[int, int]] = {}

    @hookimpl
    def pass_finished(self) -> None:
        """Copy what a run that dies would be gone on with from."""
        if self._clock() - self._last_s < self.every_s:
            return
        try:
            self._copy(skip=_AT_THE_END)
        except Exception as error:
            log.warning("%s could not be copied to %s meanwhile: %s", self.folder, self.place.where, error)
        self._last_s = self._clock()

    def finish(self) -> None:
        """Copy the rest of a finished run, its report last: with it the run is done. Its states go."""
        self._copy(skip=(REPORT,))
        self.place.put(self.folder / REPORT, f"{self.name}/{REPORT}")
        left = [n for n in self.place.names(self.name) if n.startswith(STATE)]
        self.place.remove([f"{self.name}/{n}" for n in left])

    def _copy(self, skip: tuple[str, ...]) -> None:
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if name in skip or path.name.startswith("."):
                continue
            found = path.stat()
            if self._seen.get(name) != (found.st_mtime_ns, found.st_size):
                self.place.put(path, f"{self.name}/{name}")
                self._seen[name] = (found.st_mtime_ns, found.st_size)
