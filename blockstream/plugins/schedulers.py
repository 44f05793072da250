"""What a scheduler of sweeps is given and gives back: see the hook `schedulers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Needs:
    """What one run takes of the machine it is on: a scheduler gives a machine what it has room for.

    `nbytes` is the run's budget in bytes, None for one that is a part of what is free, so that a machine
    takes one at a time. `device_nbytes` is what it takes of a device, 0 for a run on processors alone.
    """

    threads: int
    nbytes: int | None = None
    device_nbytes: int = 0


class Ended(NamedTuple):
    """A task that has ended, on the machine or process named `where`.

    `result` is what `perform` returned; `lost` says instead why the task was given up: what ran it died, and
    again each time it was tried.
    """

    task: Any
    result: Any = None
    where: str = ""
    lost: str | None = None


class Scheduler(Protocol):
    """What runs the tasks of a sweep, on however many machines."""

    def run(self, perform: Callable[[Any], Any], tasks: Iterable[Any], needs: Needs) -> Iterator[Ended]:
        """Yield every task once, in the order they end.

        `perform` and the tasks can be pickled; `perform` does not raise. A task whose machine or process has
        died is given out again, to another one: it goes on with what the first left. `tasks` may be many:
        take them as there is room. When the iterator is closed, nothing goes on.
        """
