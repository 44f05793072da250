"""The queue: one run at a time, each `blockstream run` in a process of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError

from .course import Course
from .hub import Hub
from .presets import Preset
from .process import COMMAND, PATIENCE_S, Command, error_in
from .scrub import Scrub
from .shelf import Record, Shelf, newest_first

log = logging.getLogger(__name__)

#: Runs that may wait.
MOST_WAITING = 50
#: Runs that the page lists.
MOST_LISTED = 100


class Maker:
    """What becomes of the shelf's runs. Belongs to one event loop; every page is told through the hub."""

    def __init__(
        self,
        shelf: Shelf,
        hub: Hub,
        scrub: Scrub,
        command: Sequence[str] = COMMAND,
        patience_s: Sequence[float] = PATIENCE_S,
    ) -> None:
        self.shelf, self.hub, self._scrub, self._command = shelf, hub, scrub, command
        self._patience_s = patience_s
        self.queue: list[str] = []
        self.course = Course()
        self._running: Command | None = None
        self._now = ""
        self._wake = asyncio.Event()
        self._results: list[str] = []

    # -- what a page asks for

    def add(self, preset: Preset, asked: dict[str, Any], upload: Path | None = None) -> Record:
        """Queue a new run; the uploaded image becomes its own. Raises ConfigError for a wrong config."""
        if len(self.queue) >= MOST_WAITING:
            raise ConfigError(f"{MOST_WAITING} runs wait already; let some of them end")
        name = self.shelf.next_id()
        kept = None if upload is None else self.shelf.folder / f"{name}{upload.suffix}"
        config = preset.config(asked, kept)
        if upload is not None and kept is not None:
            upload.replace(kept)
        self.shelf.set_config(name, config.dump())
        record = Record(name, preset.name, asked, upload="" if kept is None else kept.name)
        return self._enqueue(record)

    def resume(self, name: str) -> Record:
        """Queue a run that was stopped or has failed; it goes on where it was."""
        record = self.shelf.get(name)
        if record.is_open or record.state == "done":
            raise ConfigError(f"run {name} is {record.state}: there is nothing to go on with")
        return self._enqueue(record)

    def stop(self, name: str) -> Record:
        """Stop a run: one that waits leaves the queue, one that runs is interrupted."""
        record = self.shelf.get(name)
        if name in self.queue:
            self.queue.remove(name)
            return self._put(replace(record, state="stopped"))
        if record.state == "running":
            record = self._put(replace(record, state="stopping"))
            self._interrupt()
        return record

    def remove(self, name: str) -> None:
        """Remove a run that is not open from the disk."""
        self.shelf.remove(name)
        self.tell()

    # -- what a page is told

    def listing(self) -> dict[str, Any]:
        """Return all that a page shows of the runs, the newest first."""
        records = list(newest_first(self.shelf))
        return {
            "runs": [self._public(record) for record in records[:MOST_LISTED]],
            "more": max(0, len(records) - MOST_LISTED),
            "queue": list(self.queue),
        }

    def greeting(self) -> list[tuple[str, Any]]:
        """Return the events that bring a page up to date."""
        return [("runs", self.listing()), ("course", self.course.public())]

    def tell(self) -> None:
        """Tell every page what the runs are now."""
        self.hub.send("runs", self.listing())

    def _public(self, record: Record) -> dict[str, Any]:
        return {
            "id": record.id,
            "preset": record.preset,
            "state": record.state,
            "made_at": record.made_at,
            "error": self._scrub.text(record.error),
            "asked": record.asked,
            "has_reference": bool(record.upload),
            "is_begun": self.shelf.is_begun(record.id),
            "results": self.shelf.results(record.id),
            **self.shelf.figures(record.id),
        }

    # -- the work

    async def work(self) -> None:
        """Make the runs of the queue, one after another. Cancelled, it stops the one that runs."""
        while True:
            while not self.queue:
                self._wake.clear()
                await self._wake.wait()
            name = self.queue.pop(0)
            try:
                await self._make(name)
            except OSError as error:  # a full disk, a folder that has gone
                log.warning("run %s: %s", name, error)
                with suppress(OSError, KeyError):
                    self._put(replace(self.shelf.get(name), state="failed", error=str(error)))

    async def _make(self, name: str) -> None:
        folder = str(self.shelf.run_folder(name))
        args = (
            ["--resume", folder]
            if self.shelf.is_begun(name)
            else [str(self.shelf.config_of(name)), "--out", folder]
        )
        self.course, self._results, self._now = Course(name), [], name
        self._put(replace(self.shelf.get(name), state="running", error=""))
        self.hub.send("course", self.course.public())
        command = await Command.start("run", *args, "--json-lines", command=self._command)
        self._running = command
        if self.shelf.get(name).state == "stopping":
            self._interrupt()
        try:
            async for value in command.values():
                self._follow(name, value)
            code, said = await command.ended()
        except BaseException:
            await command.stop(self._patience_s)
            self._put(replace(self.shelf.get(name), state="stopped"))
            raise
        finally:
            self._running, self._now = None, ""
        stopped = self.shelf.get(name).state == "stopping" or code == 130
        state = "done" if code == 0 else "stopped" if stopped else "failed"
        error = error_in(said) if state == "failed" else ""
        self._put(replace(self.shelf.get(name), state=state, error=error))  # type: ignore[arg-type]

    def _follow(self, name: str, value: Any) -> None:
        """Take note of a line of the run."""
        if (sample := self.course.take(value)) is None:
            return
        self.hub.send("sample", sample)
        results = self.shelf.results(name)
        if results != self._results:
            self._results = results
            self.tell()

    def _interrupt(self) -> None:
        if self._running is not None:
            task = asyncio.ensure_future(self._running.stop(self._patience_s))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _enqueue(self, record: Record) -> Record:
        record = self.shelf.put(replace(record, state="waiting", error=""))
        self.queue.append(record.id)
        self._wake.set()
        self.tell()
        return record

    def _put(self, record: Record) -> Record:
        self.shelf.put(record)
        self.tell()
        return record
