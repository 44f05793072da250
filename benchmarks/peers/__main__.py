"""Race blockstream against accelerate, transformers, diffusers, AirLLM, AirCanvas and mapped safetensors.

    python -m benchmarks.peers --work DIR             # some 40 GB in DIR; goes on where it was stopped
    python -m benchmarks.peers --work DIR --small     # every contestant tried out, nothing is written
    python -m benchmarks.peers --work DIR --cells 't5/3.3GiB/*' 'stdit3/*/accelerate/0'
    python -m benchmarks.peers --work DIR --minutes 0 # only the page of what is done
    python -m benchmarks.peers --work DIR --more 2    # two trials more of what has one, half an hour
    python -m benchmarks.peers --work DIR --pairs 'stdit3/1.5GiB/AirCanvas ring' 8    # ours and it in turn

A cell is MODEL/BUDGET/WAY/TRIAL; its facts are written to DIR when it is done. Each runs in a process of
its own, in a control group limited to the budget, with nothing of the weights in the page cache. Peers are
installed from the package index, one environment at a time (where torch would come with CUDA, set
PIP_EXTRA_INDEX_URL to PyTorch's index for processors). Disk is checked before anything large is written.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from benchmarks import t5_xxl
from benchmarks._results import load, write
from benchmarks.bench_reader import raw_s
from benchmarks.peers import page
from benchmarks.peers.cells import MAIN, OTHERS, Cell, Results, main_column, missing, other_columns, pairs
from benchmarks.peers.environments import PROJECT, Environment, NoRoomError, check_disk, environment
from benchmarks.peers.models import MODELS, checkpoint, nbytes
from benchmarks.peers.ways import WAYS
from benchmarks.streaming import drop_cached
from blockstream.budget.amounts import parse_nbytes
from blockstream.engine.arena import Arena
from blockstream.plan.segments import Extent
from tests.support.cgroup import limited

TIMEOUT_S = 600
PROBE_NBYTES, PROBE_REQUEST, PROBE_DEPTH = 512 << 20, 16 << 20, 4
#: What small networks are limited to: they are megabytes, the libraries are not.
SMALL_BUDGET = "2GiB"


class Race:
    """Runs cells: makes checkpoints when they are needed, scratch folders for one contestant and network."""

    def __init__(self, work: Path, small: bool, passes: int | None = None) -> None:
        self.work, self.small, self.passes = work, small, passes
        self.python = Path()
        self.probe: Probe | None = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Run a cell; a failure is its result."""
        folder = self.checkpoint(cell.model)
        scratch = self.work / "scratch" / f"{cell.way}-{cell.model}".replace(" ", "_")
        if not scratch.exists():
            if WAYS[cell.way].packages:  # ours and plain PyTorch write nothing
                shutil.rmtree(scratch.parent, ignore_errors=True)
            scratch.mkdir(parents=True)
        if WAYS[cell.way].packages:
            check_disk(scratch, sum(p.stat().st_size for p in t5_xxl.files(folder)), f"a copy by {cell.way}")
        self.probe = self.probe or Probe(self.small)
        before = self.probe.bytes_per_s(folder)
        facts = self.run(cell, folder, scratch, "--empty" if self.small and WAYS[cell.way].fills else "")
        if "failed" in facts and WAYS[cell.way].fills and "killed" in facts["failed"]:
            facts = {**self.run(cell, folder, scratch, "--empty"), "filled": facts["failed"]}
        facts |= {"raw_bytes_per_s": before, "load": os.getloadavg()[0]}
        print(f"{cell.id}: {page.line(facts)}", flush=True)
        return facts

    def checkpoint(self, name: str) -> Path:
        """Return a network's folder, written if need be."""
        folder = self.work / ("small" if self.small else "models") / name
        if not self.small and not (folder / "config.json").exists():
            check_disk(self.work, nbytes(name), f"the checkpoint of {name}")
            shutil.rmtree(folder, ignore_errors=True)
        return checkpoint(name, folder, self.small)

    def run(self, cell: Cell, folder: Path, scratch: Path, empty: str) -> dict[str, Any]:
        """Run a contestant in a control group; without a limit its group may hold all there is."""
        budget = (
            None if cell.budget == "unlimited" else parse_nbytes(SMALL_BUDGET if self.small else cell.budget)
        )
        drop_cached(folder)
        variables = {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.work / "hf")}
        command = ["env", *(f"{k}={v}" for k, v in variables.items()), str(self.python)]
        command += ["-m", "benchmarks.peers.contestant", cell.way, cell.model, str(folder), str(scratch)]
        command += ["--passes", str(self.passes or MODELS[cell.model].passes), *([empty] if empty else [])]
        command += ["--budget", str(budget)] if budget else []
        with limited(memory_nbytes=budget or psutil.virtual_memory().total) as group:
            try:
                done = group.run(command, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return {"way": cell.way, "failed": f"not done after {TIMEOUT_S} s"}
            peak = group.peak_nbytes
        if done.returncode == 0:
            return page.facts_of(done.stdout) | {"group_peak_nbytes": peak}
        why = page.cause(done.returncode, done.stderr)
        for path, name in ((self.work, "DIR"), (PROJECT, ".")):
            why = why.replace(str(path), name)
        return {"way": cell.way, "failed": why, "group_peak_nbytes": peak}


class Probe:
    """Reads a part of a checkpoint past the page cache: what the disk gives at this minute."""

    def __init__(self, small: bool) -> None:
        nbytes = 4 << 20 if small else PROBE_NBYTES
        arena = Arena(nbytes)
        arena.populate(Extent(0, nbytes))
        self._room = arena.view(Extent(0, nbytes))

    def bytes_per_s(self, folder: Path) -> float:
        """Return the bytes a second of one reading of the largest file."""
        path = max(t5_xxl.files(folder), key=lambda p: p.stat().st_size)
        drop_cached(folder)
        view = self._room[: min(len(self._room), path.stat().st_size // 4096 * 4096)]
        return len(view) / raw_s(path, view, PROBE_REQUEST, PROBE_DEPTH)


def race(
    cells: list[Cell],
    results: Results,
    runner: Race,
    options: argparse.Namespace,
    may_begin: Callable[[], bool],
) -> None:
    """Run the cells, one environment after the other."""
    for packages, group in groupby(cells, key=lambda cell: WAYS[cell.way].packages):
        with ExitStack() as stack:
            execute = _installed(stack, packages, runner)
            results.run(group, execute, options.cells, options.retry, may_begin)
        shutil.rmtree(runner.work / "scratch", ignore_errors=True)


def in_pairs(cells: list[Cell], results: Results, runner: Race) -> None:
    """Run cells of ours and of one peer as they come, with the peer's environment made once."""
    with ExitStack() as stack:
        packages = {WAYS[cell.way].packages for cell in cells}
        execute = {p: _installed(stack, p, runner) for p in packages}
        results.run(cells, lambda cell: execute[WAYS[cell.way].packages](cell))
    shutil.rmtree(runner.work / "scratch", ignore_errors=True)


def _installed(stack: ExitStack, packages: tuple[str, ...], runner: Race) -> Callable[[Cell], dict[str, Any]]:
    """Return what runs a cell in an environment that is made for the first one, and goes with the stack."""

    @cache
    def made() -> Environment | str:
        try:
            env = stack.enter_context(environment(runner.work / "environment", packages))
        except RuntimeError as error:
            return f"cannot be installed: {error}"
        print(
            f"environment {' '.join(packages) or 'of the project'}: {env.seconds:.0f} s {env.note}",
            flush=True,
        )
        return env

    def execute(cell: Cell) -> dict[str, Any]:
        env = made()
        if isinstance(env, str):
            return {"way": cell.way, "failed": env}
        runner.python = env.python
        return runner(cell) | ({"note": env.note} if env.note else {})

    return execute


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and what is done")
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN", help="of MODEL/BUDGET/WAY/TRIAL"
    )
    parser.add_argument("--minutes", type=float, default=90, help="begin no cell after this")
    parser.add_argument("--more", type=int, default=0, help="further trials at the other budgets")
    parser.add_argument(
        "--pairs", nargs=2, metavar=("ROW", "N"), help="N trials of a MODEL/BUDGET/WAY and ours"
    )
    parser.add_argument("--passes", type=int, help="of each run, where a model's own are too few")
    parser.add_argument("--retry", action="store_true", help="run cells that failed once more")
    parser.add_argument("--small", action="store_true", help="networks of some megabytes, one trial")
    options = parser.parse_args()
    row, count = options.pairs or ("", "0")
    parts = row.split("/")
    known = len(parts) == 3 and parts[0] in MODELS and parts[1] in (MAIN, *OTHERS) and parts[2] in WAYS
    if options.pairs and not (known and count.isdigit()):
        parser.error(f"--pairs {row!r} {count!r}: no row of {list(MODELS)}, {[MAIN, *OTHERS]}, {list(WAYS)}")
    rival = Cell(*parts) if options.pairs else None
    work = options.work.resolve()
    results = Results(work / ("cells-small" if options.small else "cells"))
    end = time.monotonic() + 60 * (0 if rival else options.minutes)
    runner = Race(work, options.small, options.passes)

    def may_begin() -> bool:
        return time.monotonic() < end

    cells = [c for c in main_column() if not (options.small and c.trial)]
    lock = (work / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"another race is under way in {work}") from None
    try:
        if rival:
            in_pairs(pairs(results.read(), rival, int(count)), results, runner)
        race(cells, results, runner, options, may_begin)
        for trial in range(1 + options.more):
            race(other_columns(results.read(), trial), results, runner, options, may_begin)
    except NoRoomError as error:
        raise SystemExit(f"stopped: {error}; the same command goes on") from error
    found = results.read()
    others = [c for trial in range(1 + options.more) for c in other_columns(found, trial)]
    left = len(missing(found, [*cells, *others]))
    if left:
        print(f"{left} cells are left; the same command goes on with them")
    if options.small or not found:
        print(page.markdown(found))
        return
    text = f"{page.draw(found)}\n\n{page.markdown(found)}\n\n{load()}"
    if left:
        text += f"\n\n{left} cells have not been run."
    title = f"Ours and its peers, at {MAIN} and other limits"
    write("peers", "python -m benchmarks.peers --work DIR", title, text, page.data(found))


if __name__ == "__main__":
    main()
