"""Kill a program at its n-th change of a file, or let the disk be full there, for every n in turn.

`every_fault` runs in a process of its own, which imports what it needs once and forks for each attempt: first
with the fault, then again without one. A change is opening to write, writing, syncing, renaming, linking,
removing, making a folder, cutting a file. Of a write that is killed half arrives.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events that are changes. Those of `open` are looked at further.
FREEING = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
EVENTS = FREEING | {"os.mkdir", "os.truncate", "os.link", "os.symlink"}
#: Calls that the interpreter does not audit.
CALLS = ("write", "pwrite", "pwritev", "writev", "fsync", "fdatasync", "posix_fallocate")


@dataclass
class Fault:
    """What happens at which change: "kill" or "full"; nothing where `at` is 0."""

    at: int = 0
    kind: str = "kill"
    seen: int = 0

    def change(self, half: Callable[[], Any] | None = None, frees: bool = False) -> None:
        """Count a change that is about to be made; `half` makes a part of it, `frees` is no use of space."""
        self.seen += 1
        if self.seen != self.at:
            return
        if self.kind == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif not frees:
            raise OSError(FULL.errno, FULL.strerror)


fault = Fault()


def watch() -> None:
    """Count every later change of a file in this process; before the package is imported."""

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS:
            fault.change(frees=event in FREEING)
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            mode, flags = args[1], args[2]
            writes = any(c in mode for c in "wax+") if mode else isinstance(flags, int) and flags & WRITING
            if writes and not str(args[0]).startswith(("/dev/", "/proc/")):
                fault.change()

    sys.addaudithook(hear)
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, _watched(name, getattr(os, name)))


def _watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(descriptor: Any, *args: Any) -> Any:
        if descriptor in (1, 2):
            return call(descriptor, *args)
        half = None
        if name in ("write", "pwrite"):
            half = lambda: call(descriptor, memoryview(args[0])[: len(args[0]) // 2 // 512 * 512], *args[1:])  # noqa: E731
        fault.change(half)
        return call(descriptor, *args)

    return watched


def attempt(act: Callable[[Path], Any], folder: Path, at: int, kind: str) -> tuple[int, str, int]:
    """Run `act(folder)` in a fork; return (exit code or minus the signal, what it said, changes it made)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        code, said = 0, ""
        fault.at, fault.kind, fault.seen = at, kind, 0
        try:
            code = act(folder) or 0
        except BaseException as error:
            code = 3
            said = f"{type(error).__name__}: {error}"
            if type(error).__module__.partition(".")[0] != "blockstream":
                said += "\n" + traceback.format_exc()
        seen, fault.at = fault.seen, 0
        os.write(write, json.dumps([code if isinstance(code, int) else 0, said, seen]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not told:
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 4, "", 0
    code, said, seen = json.loads(told)
    return code, said, seen


def every_fault(
    act: Callable[[Path], Any], root: Path, kinds: tuple[str, ...] = ("kill", "full"), step: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield what the attempt with a fault and the next one came to, for each change of `act` and kind."""
    for kind in kinds:
        for n in count(1, step):
            folder = root / f"{kind}-{n}"
            folder.mkdir()
            first = attempt(act, folder, n, kind)
            if first[0] >= 0 and first[2] < n:
                assert first[0] == 0, first
                break
            left = names(folder)
            again = attempt(act, folder, 0, kind)
            yield {"kind": kind, "at": n, "first": first, "left": left, "again": again, "folder": str(folder)}


def names(folder: Path) -> list[str]:
    """Return the paths of all files below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def run(program: str, root: Path, timeout: float = 250) -> list[dict[str, Any]]:
    """Run a program that defines `act(folder)`; return the outcomes. It may set KINDS and STEP."""
    root.mkdir(exist_ok=True)
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.support import faults\nfaults.watch()\n"
        f"KINDS, STEP = ('kill', 'full'), 1\n{program}\n"
        "for row in faults.every_fault(act, Path(sys.argv[1]), KINDS, STEP):\n"
        "    print('row', json.dumps(row))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row ")]
