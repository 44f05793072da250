"""One `blockstream` command in a process of its own: its lines as they come, its error, a gentle end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

#: What starts a command line; a test puts a stand-in here.
COMMAND = (sys.executable, "-c", "import sys; from blockstream.cli.main import main; sys.exit(main())")
#: The longest line of JSON, and what is kept of what a command says besides.
MOST_LINE, MOST_SAID = 16 << 20, 64 << 10
#: Seconds that an interrupted command is given before it is interrupted again, and before it is killed.
PATIENCE_S = (30.0, 60.0)


class Command:
    """A command line that runs. Its stdout is JSON, its stderr is kept for the error.

    It is no part of the terminal's group: Ctrl-C there reaches it through `stop` alone, once.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said = asyncio.ensure_future(_last_of(process.stderr))

    @classmethod
    async def start(cls, *args: str, command: Sequence[str] = COMMAND) -> Command:
        """Start a command line of blockstream."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            *args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            limit=MOST_LINE,
            start_new_session=True,
        )
        return cls(process)

    async def values(self) -> AsyncIterator[Any]:
        """Yield the JSON value of each line; what is none is left out."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with suppress(ValueError):
                yield json.loads(line)

    async def output(self) -> str:
        """Return all that it prints, at most `MOST_LINE` bytes."""
        assert self._process.stdout is not None
        data = b""
        while piece := await self._process.stdout.read(1 << 16):
            data += piece[: MOST_LINE - len(data)]
        return data.decode(errors="replace")

    async def ended(self) -> tuple[int, str]:
        """Return its exit code and what it said on stderr, once it has ended."""
        code = await self._process.wait()
        return code, (await self._said).decode(errors="replace")

    async def stop(self, patience_s: Sequence[float] = PATIENCE_S) -> None:
        """Interrupt it and return when it has ended; again if that takes long, and kill it at last."""
        for wait_s in patience_s:
            self._signal(signal.SIGINT)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.ended()), wait_s)
                return
        self._signal(signal.SIGKILL)
        await self.ended()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


async def _last_of(stream: asyncio.StreamReader | None) -> bytes:
    """Read a stream to its end and return the last of it."""
    assert stream is not None
    kept = b""
    while piece := await stream.read(1 << 16):
        kept = (kept + piece)[-MOST_SAID:]
    return kept


def error_in(said: str) -> str:
    """Return the message that a command ended with, without what it logged before."""
    mark = "blockstream: "
    lines = said.strip().splitlines()
    at = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].startswith(mark)), None)
    found = lines[-3:] if at is None else [lines[at].removeprefix(mark), *lines[at + 1 :]]
    return "\n".join(found)[:4000] or "it ended without a word"


async def ask(*args: str, command: Sequence[str] = COMMAND, wait_s: float) -> tuple[int, str, str]:
    """Return (exit code, stdout, the error's text) of a command that ends by itself, or is stopped."""
    running = await Command.start(*args, command=command)
    try:
        async with asyncio.timeout(wait_s):
            printed = await running.output()
            code, said = await running.ended()
    except TimeoutError:
        await running.stop((5.0,))
        return 1, "", f"it took more than {wait_s:.0f} s and was stopped"
    except BaseException:
        await running.stop((5.0,))
        raise
    return code, printed, error_in(said) if code else ""
