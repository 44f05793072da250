"""The live line of a run: stage, pass, time left, read speed, memory against the budget.

An observer: register it with the run's plugins, or call its methods. It shows on a terminal only,
and only once the run has taken two seconds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from blockstream.budget.amounts import format_nbytes
from blockstream.engine.spans import Span
from blockstream.plan.segments import Stage
from blockstream.plugins.hookspecs import hookimpl
from blockstream.system.memory import held
from blockstream.system.terminal import visible

#: A run shorter than this shows nothing, in seconds.
QUIET_S = 2.0

#: From this part of a stage on, what is left of it follows from what it took so far alone.
SEEN = 0.1

#: The read speed is that of the last seconds.
WINDOW_S = 5.0


class Progress:
    """What is known of a run in progress, and the line that says it.

    Use it as a context manager around the run: leaving it ends the display, whatever happened. Spans
    come from the loader thread too, and the display has a thread: one lock guards what they share.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        held_nbytes: Callable[[], int] = lambda: held().nbytes,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._held_nbytes = held_nbytes
        self._lock = threading.Lock()
        self.live: Live | None = None
        self._run: Any = None
        self._stage: Stage | None = None
        self._pass_index = self._visits = 0
        self._began = self._stage_began = clock()
        self._loads: deque[tuple[float, int]] = deque()

    @property
    def out(self) -> Path | None:
        """Return the folder of the run; None before it has begun."""
        return getattr(self._run, "out", None)

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if self._console.is_terminal:
            self.live = Live(get_renderable=self._line, console=self._console, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @hookimpl
    def run_started(self, run: Any) -> None:
        """Remember the run: its budget and its predicted times are shown."""
        self._run = run

    @hookimpl
    def stage_started(self, stage: Stage) -> None:
        """Begin a stage."""
        with self._lock:
            self._stage, self._stage_began = stage, self._clock()
            self._pass_index = self._visits = 0

    @hookimpl
    def stage_finished(self, stage: Stage) -> None:
        """End a stage."""
        with self._lock:
            self._stage = None

    @hookimpl
    def pass_started(self, stage: Stage, pass_index: int) -> None:
        """Begin a pass of the stage."""
        with self._lock:
            self._pass_index, self._visits = pass_index, 0

    @hookimpl
    def segment_loaded(self, span: Span) -> None:
        """Count what was read."""
        with self._lock:
            self._loads.append((self._clock(), span.nbytes))

    @hookimpl
    def segment_executed(self, span: Span) -> None:
        """Count a visit."""
        with self._lock:
            self._visits += 1

    def facts(self) -> dict[str, Any]:
        """Return what is known now, as plain values; what is not known is None.

        `at_s` since the display began; `stage`, `pass` (from 1), `passes`, `part` (0 to 1 of the stage) and
        `left_s` of all that is left; `read_bytes_per_s` over the last seconds; `held_nbytes` by the process
        of its `budget_nbytes`, `device_held_nbytes` and `device_budget_nbytes` on a device; `predicted_s` of
        each stage in order.
        """
        now = self._clock()
        with self._lock:
            stage, speed = self._stage, self._speed(now)
            index, visits, elapsed = self._pass_index, self._visits, now - self._stage_began
        found: dict[str, Any] = dict.fromkeys(("stage", "pass", "passes", "part", "left_s"))
        if stage is not None:
            total = stage.passes.most
            found |= {"stage": stage.name, "pass": index + 1, "passes": total}
            if total:
                part = (index + min(1.0, visits / len(stage.order))) / total
                found["part"] = part
                if 0 < part < 1:
                    found["left_s"] = self._left_s(stage.name, part, elapsed) + self._later_s(stage.name)
        return found | {
            "at_s": now - self._began,
            "read_bytes_per_s": speed,
            "held_nbytes": self._held_nbytes(),
            "budget_nbytes": getattr(self._run, "budget_nbytes", None),
            "device_held_nbytes": self._on_device(),
            "device_budget_nbytes": getattr(self._run, "device_budget_nbytes", None),
            "predicted_s": dict(getattr(self._run, "predicted_s", None) or {}),
        }

    def text(self) -> str:
        """Return the line as it is now; "" for a run that is young or between stages."""
        found = self.facts()
        if found["stage"] is None or found["at_s"] < QUIET_S:
            return ""
        total = found["passes"]
        parts = [found["stage"], f"pass {found['pass']}" + (f" of {total}" if total else "")]
        if found["part"] is not None:
            parts.append(f"{found['part']:.0%}")
        if found["left_s"] is not None:
            parts.append(f"{duration(found['left_s'])} left")
        parts.append(f"{found['read_bytes_per_s'] / 1e9:.2f} GB/s")
        parts.append(_held_of(found["held_nbytes"], found["budget_nbytes"]))
        if found["device_held_nbytes"] is not None:
            on_device = _held_of(found["device_held_nbytes"], found["device_budget_nbytes"])
            parts.append(f"on the device {on_device}")
        return "  ".join(parts)

    def _on_device(self) -> int | None:
        """Return the bytes this process holds on the run's device; None without one."""
        device = getattr(self._run, "device", None)
        if device is None:
            return None
        now = device.memory()
        return int(now.reserved_nbytes + now.outside_nbytes)

    def _line(self) -> Text:
        return Text(visible(self.text()), no_wrap=True, overflow="ellipsis")

    def _speed(self, now: float) -> float:
        """Return the bytes per second read in the last seconds."""
        while self._loads and self._loads[0][0] < now - WINDOW_S:
            self._loads.popleft()
        window = min(WINDOW_S, now - self._began)
        return sum(nbytes for _, nbytes in self._loads) / window if window > 0 else 0.0

    def _left_s(self, name: str, part: float, elapsed: float) -> float:
        """Return what is left of a stage: by what it was predicted to take, more and more by what it took."""
        predicted = dict(getattr(self._run, "predicted_s", None) or {})
        seen, measured = min(1.0, part / SEEN), elapsed / part
        expected = float(predicted.get(name, measured))
        return (1 - part) * (seen * measured + (1 - seen) * expected)

    def _later_s(self, name: str) -> float:
        """Return the predicted seconds of what comes after the stage of that name."""
        predicted = dict(getattr(self._run, "predicted_s", None) or {})
        rest_s = float(getattr(self._run, "rest_s", 0.0))
        names = list(predicted)
        after = names[names.index(name) + 1 :] if name in names else []
        return float(sum(predicted[later] for later in after)) + rest_s


def duration(seconds: float) -> str:
    """Return a time for people: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _held_of(nbytes: int, budget_nbytes: int | None) -> str:
    of = f" of {format_nbytes(budget_nbytes)}" if budget_nbytes else ""
    return f"{format_nbytes(nbytes)}{of}"
