"""Run a command as an attack and judge what came of it: shared by the kinds of benchmarks.attacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: A process of its own, which imports all, has twice as long.
LIMIT_S = 120
BAD = ("hang", "traceback", "silent", "lost")
OUTCOMES = (*BAD, "unnamed", "refused by name", "fine")
BLOCKSTREAM = [sys.executable, "-c", "import sys; from blockstream.cli.main import main; sys.exit(main())"]
#: A run of a second, to which an attack adds one thing.
SMALL = ["height=32", "width=32", "frames=17", "steps=2", "threads=1", "cache=off"]
PROMPT = 'prompts=["a red star"]'


@dataclass(frozen=True)
class Attacked:
    """What one attack came to; `said` is the end of what was printed, or what was wrong."""

    kind: str
    name: str
    outcome: str
    said: str = ""


def judged(kind: str, name: str, code: int | None, said: str, needle: str | None) -> Attacked:
    """Return the outcome of a command that had to refuse, naming `needle`; None: that had to be done."""
    tail = said.strip()[-300:]
    if code is None:
        return Attacked(kind, name, "hang", tail)
    if code < 0 or "Traceback (most recent call last)" in said or "BLOCKSTREAM_DEBUG=1 shows where" in said:
        return Attacked(kind, name, "traceback", f"exit {code}: {tail}")
    if needle is None:
        return Attacked(kind, name, "fine" if code == 0 else "unnamed", "" if code == 0 else tail)
    if code == 0:
        return Attacked(kind, name, "silent", tail)
    return Attacked(kind, name, "refused by name" if needle in said else "unnamed", tail)


def forked(
    argv: Sequence[str], log: Path, before: Callable[[], object] = lambda: None
) -> tuple[int | None, str]:
    """Run a command in a fork; return its exit code (None: it had to be ended) and all that it printed."""
    from blockstream.cli.main import main

    child = os.fork()
    if child == 0:
        code = 99
        try:
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            before()
            code = main(list(argv))
            sys.stdout.flush()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 2
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(errors="replace")


def run_argv(out: Path, *sets: str) -> list[str]:
    """Return a small run's command line with some keys."""
    keys = [word for one in (*SMALL, PROMPT, *sets) for word in ("--set", one)]
    return ["run", "movd.yaml", *keys, "--out", str(out)]


def shell(
    argv: Sequence[str], redirect: str, folder: Path, env: dict[str, str] | None = None, before: str = ""
) -> tuple[int | None, str]:
    """Run a command by a shell; return its exit code, None where it had to be ended, and what it said."""
    line = f'{before}"$@" {redirect}'
    with subprocess.Popen(
        ["sh", "-c", line, "sh", *BLOCKSTREAM, *argv],
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as child:
        try:
            out, _ = child.communicate(timeout=2 * LIMIT_S)
            return child.returncode, out.decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None, ""
