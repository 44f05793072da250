"""Drive a sweep: what is left to do goes to a scheduler, what comes back is kept, and told in one report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockstream.budget.amounts import headroom_part, parse_nbytes
from blockstream.errors import ConfigError
from blockstream.plugins import Ended, Needs, Plugins, Scheduler
from blockstream.run.config import RunConfig, make_config, with_sets
from blockstream.run.numerics import pinned
from blockstream.run.resume import resumed
from blockstream.run.yamlfile import Document, dump
from blockstream.system.atomic import json_bytes, locked

from .place import Place
from .results import Results, Totals
from .tasks import PROMPTS, Task, as_sets, tasks_of
from .work import Work

RECORD, REPORT = "sweep.json", "report.json"
SCHEMA = 1
#: A part of a device's memory is counted as if it had so much: nobody has asked it.
DEVICE_NBYTES = 1 << 40
#: When so many runs have failed and none has gone well, the rest would fail too.
FIRST = 10


class Sweep:
    """One sweep: its config in every cell of a grid, its prompts, its place. Nothing is written before `run`.

    Numerics that are `auto` are pinned to what they come to here: every machine computes alike. Where runs
    are `elsewhere` a device that is named need not be here.
    Raises ConfigError for a config, a cell or a first prompt that cannot be used.
    """

    def __init__(
        self,
        document: Document,
        prompts: Sequence[str],
        digest: str,
        where: str,
        cells: Sequence[dict[str, Any]] = ({},),
        batch: int = 1,
        elsewhere: bool = False,
    ) -> None:
        self.prompts, self.digest, self.cells, self.batch = prompts, digest, list(cells), batch
        self.place = Place(where)
        self.key = _key_of(document)
        if self.key == "prompt" and batch > 1:
            raise ConfigError(f"--batch {batch}: this pipeline takes one prompt a run; leave it out")
        first = prompts[:batch]
        made = [make_config(_with_prompts(document, self.key, first, c)) for c in self.cells]
        configs = [pinned(config, planning=elsewhere) for config in made]
        if (was := self._record()) is not None:
            pairs = zip(configs, was["configs"], strict=True)
            configs = [resumed(config, old, Path(where)) for config, old in pairs]
        self.configs = [_plain(config) for config in configs]
        self.needs = _needs(configs)
        self.work = Work(self._where(), tuple(map(dump, self.configs)), self.key)

    def run(
        self, scheduler: Scheduler, told: Callable[[Totals], None] = lambda totals: None
    ) -> dict[str, Any]:
        """Run what is left; return what report.json holds. `told` hears of every run that has ended.

        A failed run is one line of the report, and is tried again when the same sweep is run again. Raises
        ConfigError when the first ten have all failed.
        """
        results, totals = Results(self.place), self.totals()
        began = time.monotonic()
        with ExitStack() as stack:
            if (folder := self.place.folder) is not None:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
            self.place.write(RECORD, json_bytes(self.record()))
            for line in results.read():
                totals.add(line)
            totals.failed.clear()
            before = len(totals.done)
            stack.callback(results.flush)
            ran = scheduler.run(self.work, self._left(totals.done), self.needs)
            if hasattr(ran, "close"):
                stack.callback(ran.close)
            told(totals)
            for ended in ran:
                line = _line(ended)
                if totals.add(line):
                    results.add(line)
                told(totals)
                if len(totals.done) == before and len(totals.failed) >= FIRST:
                    first = next(iter(totals.failed.values()))
                    raise ConfigError(
                        f"the first {FIRST} runs have all failed, the first of them with: {first}; "
                        "mend that and run the same again"
                    )
            results.flush()
            report = {
                "schema": SCHEMA,
                **totals.account(),
                "elapsed_s": time.monotonic() - began,
                "grid": self.cells,
                "batch": self.batch,
                "results": "results/*.jsonl",
            }
            self.place.write(REPORT, json_bytes(report))
        return report

    def totals(self) -> Totals:
        """Return the sums of a sweep of which nothing is done."""
        runs = len(self.cells) * -(-len(self.prompts) // self.batch)
        return Totals(runs, len(self.cells) * len(self.prompts))

    def record(self) -> dict[str, Any]:
        """Return what sweep.json holds: what the sweep was begun with."""
        return {
            "schema": SCHEMA,
            "prompts": {"count": len(self.prompts), "sha256": self.digest},
            "grid": self.cells,
            "batch": self.batch,
            "configs": self.configs,
        }

    def _left(self, done: set[str]) -> Iterator[Task]:
        for task in tasks_of(self.prompts, len(self.cells), self.batch):
            if task.name not in done:
                yield task

    def _where(self) -> str:
        """Return the place as another process, elsewhere on this file system, finds it."""
        return self.place.where if self.place.folder is None else str(self.place.folder)

    def _record(self) -> dict[str, Any] | None:
        """Return what a sweep was begun with that is there; refuse another one's."""
        data = self.place.read(RECORD)
        if data is None:
            return None
        try:
            was = json.loads(data)
            found = {key: was[key] for key in ("prompts", "grid", "batch")}
            if was["schema"] != SCHEMA or len(was["configs"]) != len(was["grid"]):
                raise ValueError(f"schema {was['schema']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.place.where}/{RECORD} is no sweep's ({error}); name another --out"
            ) from error
        now = {
            "prompts": {"count": len(self.prompts), "sha256": self.digest},
            "grid": self.cells,
            "batch": self.batch,
        }
        for key, value in now.items():
            if found[key] != json.loads(json.dumps(value)):
                raise ConfigError(
                    f"{self.place.where} was begun with other {key}: {_brief(found[key])}, not "
                    f"{_brief(value)}; go on with those, or name another --out"
                )
        return dict(was)


def _key_of(document: Document) -> str:
    """Return the key by which a config's pipeline takes prompts."""
    ref = document.data.get("pipeline")
    if not isinstance(ref, str):
        return "prompts"  # what is wrong with the config is said when it is made
    options = Plugins().find("pipeline", ref)[1].options
    fields = {} if options is None else options.model_fields
    for key in PROMPTS:
        if key in fields:
            return key
    raise ConfigError(f"pipeline {ref!r} takes neither prompts nor prompt: a sweep gives each run its own")


def _with_prompts(document: Document, key: str, prompts: Sequence[str], cell: Mapping[str, Any]) -> Document:
    """Return a config's document with a cell's values and some prompts in place of its own."""
    document = with_sets(document, as_sets(cell))
    others = {k: v for k, v in document.data.items() if k not in PROMPTS}
    given = list(prompts) if key == "prompts" else prompts[0]
    return replace(document, data={**others, key: given, "output": None})


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return a config's keys and values but for its prompts."""
    return {k: v for k, v in config.resolved().items() if k not in PROMPTS}


def _needs(configs: Sequence[RunConfig]) -> Needs:
    """Return what the largest of some configs takes."""
    on_device = [c for c in configs if c.device != "cpu"]
    amounts = [None if headroom_part(c.budget) is not None else parse_nbytes(c.budget) for c in configs]
    amounts += [None for c in on_device if headroom_part(c.device_budget) is not None]
    explicit = [nbytes for nbytes in amounts if nbytes is not None]
    return Needs(
        threads=max(c.threads for c in configs if isinstance(c.threads, int)),
        nbytes=max(explicit) if len(explicit) == len(amounts) else None,
        device_nbytes=max((parse_nbytes(c.device_budget, DEVICE_NBYTES) for c in on_device), default=0),
    )


def _line(ended: Ended) -> dict[str, Any]:
    """Return the line of a task that has ended, however it has."""
    if ended.lost is None:
        return {**ended.result, "where": ended.where}
    task: Task = ended.task
    line = {"run": task.name, "first": task.first, "cell": task.cell, "prompts": list(task.prompts)}
    return {**line, "where": ended.where, "error": ended.lost}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
