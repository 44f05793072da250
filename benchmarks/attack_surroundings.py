"""Attacks by what is around: streams, folders, encodings, limits not as usual; memory at its edge."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.attack_commands import (
    BLOCKSTREAM,
    LIMIT_S,
    PROMPT,
    SMALL,
    Attacked,
    forked,
    judged,
    run_argv,
    shell,
)
from tests.support import cgroup


def odd_environments(folder: Path, every: int) -> Iterator[Attacked]:
    """Run where streams, folders, encodings or limits are not as usual."""
    kind = "odd environment"
    plan = ["plan", "movd.yaml"]
    for name, redirect in {"closed output": ">&-", "closed streams": "<&- >&- 2>&-"}.items():
        yield judged(kind, name, *shell(run_argv(folder / name), redirect, folder), None)
        whole = (folder / name / "video.mp4").exists()
        yield Attacked(kind, f"{name}, the video", "fine" if whole else "lost")
    yield judged(kind, "output on a full device", *shell(plan, "> /dev/full", folder), "No space left")
    for encoding in ("ascii", "cp1252", "utf-16"):
        env = {"PYTHONIOENCODING": encoding, "COLUMNS": "80", "PYTHONUTF8": "0", "LC_ALL": "C"}
        yield judged(kind, f"plan in {encoding}", *shell(plan, "", folder, env), None)
    for name, env in {
        "no home": {"HOME": "/nonexistent", "BLOCKSTREAM_CACHE": ""},
        "a cache that is a file": {"BLOCKSTREAM_CACHE": "/etc/passwd"},
        "a cache that is a device": {"BLOCKSTREAM_CACHE": "/dev/zero"},
        "20 columns": {"COLUMNS": "20", "TERM": "dumb"},
        "ten threads": {"OMP_NUM_THREADS": "10"},
    }.items():
        yield judged(kind, name, *shell(run_argv(folder / name), "", folder, env), None)
    limit = "ulimit -n 40; "
    yield judged(kind, "40 open files", *shell(run_argv(folder / "files"), "", folder, before=limit), None)
    gone = "mkdir gone; cd gone; rmdir ../gone; "
    yield judged(kind, "a folder that is gone", *shell(plan, "", folder, before=gone), "working folder")
    for name, target in {"a device": "/dev/null/out", "under a file": "/etc/passwd/out"}.items():
        code, said = forked(run_argv(Path(target)), folder / "log")
        yield judged(kind, f"output {name}", code, said, target.rsplit("/", 1)[0])
    yield _removed_in_mid_run(folder)
    yield from _without_meminfo(folder)


def _removed_in_mid_run(folder: Path) -> Attacked:
    """Remove the output folder while a run writes to it."""
    out = folder / "removed"

    def remove() -> None:
        import shutil
        import threading

        def soon() -> None:
            while not (out / "ledger.jsonl").exists():
                time.sleep(0.005)
            shutil.rmtree(out, ignore_errors=True)

        threading.Thread(target=soon, daemon=True).start()

    code, said = forked(run_argv(out, "steps=6"), folder / "log", remove)
    return judged("odd environment", "the output folder removed in mid-run", code, said, out.name)


def _without_meminfo(folder: Path) -> Iterator[Attacked]:
    """Hide /proc/meminfo in a mount namespace of its own, where this system lets one."""
    (folder / "empty").touch()
    hide = f"unshare -m sh -c 'mount --bind {folder}/empty /proc/meminfo && exec \"$@\"' sh "
    if subprocess.run(["sh", "-c", f"{hide} true"], capture_output=True, check=False).returncode == 0:
        found = shell(run_argv(folder / "meminfo"), "", folder, before=hide)
        yield judged("odd environment", "an empty meminfo", *found, None)


def edge_of_memory(folder: Path, every: int) -> Iterator[Attacked]:
    """Run under the least that a plan names, just above and just below, and under a limit of the kernel's."""
    kind = "edge of memory"
    keys = [word for one in (*SMALL, PROMPT) for word in ("--set", one)]
    code, said = shell(["plan", "movd.yaml", *keys, "--json"], "2>/dev/null", folder)
    if code != 0:
        yield judged(kind, "plan", code, said, None)
        return
    least = int(json.loads(said)["least_nbytes"])
    for more in (0, 1, 1 << 20, 32 << 20):
        out = folder / f"plus-{more}"
        argv = [*run_argv(out, f"budget={least + more}", "arena=auto"), "--json"]
        code, said = shell(argv, f"2>{out}.err", folder)
        said += Path(f"{out}.err").read_text()
        found = judged(kind, f"the least + {more}", code, said, None)
        if code == 0 and not json.loads((out / "report.json").read_text())["budget"]["held"]:
            found = Attacked(kind, found.name, "silent", "the budget was broken")
        yield found
    for less in (0.9, 0.5, 0.1):
        out = folder / f"less-{less}"
        code, said = shell(run_argv(out, f"budget={int(least * less)}", "arena=auto"), "", folder)
        yield judged(kind, f"{less:.0%} of the least", code, said, "the least")
    if cgroup.why_not("memory") is None:
        yield from _limits(folder, least)


def _limits(folder: Path, least: int) -> Iterator[Attacked]:
    """Run under limits of the kernel's from below what importing takes up to what runs, each refused or done.

    First where what importing takes was never measured, then where the cache has it.
    """
    measure = "from blockstream.system.runtime_floor import runtime_floor; runtime_floor()"
    near = {mib << 20: ("auto",) for mib in range(150, 410, 10)}
    near |= {mib << 20: ("auto", "300MiB", "1GiB") for mib in (340, 360, 380)}
    near |= {least + (mib << 20): ("auto",) for mib in (48, 256)}
    for known in (False, True):
        if known:
            subprocess.run([sys.executable, "-c", measure], check=True)
        for nbytes, budgets in near.items():
            for budget in budgets:
                out = folder / f"limit-{nbytes}-{budget}-{known}"
                command = [*BLOCKSTREAM, *run_argv(out, f"budget={budget}", "arena=auto")]
                with cgroup.limited(memory_nbytes=nbytes) as group:
                    done = group.run(command, timeout=4 * LIMIT_S)
                said = done.stdout + done.stderr
                name = f"budget {budget} under a limit of {nbytes >> 20} MiB"
                name += ", what importing takes known" if known else ""
                needle = None if done.returncode == 0 else "leaves" if "leaves" in said else "the least is"
                yield judged("edge of memory", name, done.returncode, said, needle)
