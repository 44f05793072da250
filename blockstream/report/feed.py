"""A run in progress for programs: a JSON line twice a second, for as long as somebody reads."""

from __future__ import annotations

import _thread
import json
import threading
from types import TracebackType
from typing import Any, TextIO

from .progress import Progress

#: Seconds from line to line.
EVERY_S = 0.5


class Feed:
    """Writes `Progress.facts` to a stream from a thread of its own. Use it round the run.

    Once nobody reads the stream any more, the run is interrupted as by Ctrl-C: what started it has gone.
    """

    def __init__(self, progress: Progress, out: TextIO, every_s: float = EVERY_S) -> None:
        self._progress, self._out, self._every_s = progress, out, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _write_all(self) -> None:
        while True:
            try:
                write_line(self._out, self._progress.facts())
            except (OSError, ValueError):  # the pipe's other end is closed
                _thread.interrupt_main()
                return
            if self._ended.wait(self._every_s):
                return


def write_line(out: TextIO, value: Any) -> None:
    """Write a value as one line of JSON, at once."""
    out.write(json.dumps(value, separators=(",", ":")) + "\n")
    out.flush()
