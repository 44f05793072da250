"""The built-in scheduler of sweeps: processes of this machine, as many at a time as it has room for."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from blockstream.plugins import Ended, Needs
from blockstream.system.limits import cpu_count, headroom

#: How long a process that is told to end may take.
LEAVE_S = 5.0


class ProcessOptions(BaseModel):
    """The options of `--on local`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_once: int | None = Field(
        None, ge=1, le=1024, description="runs at a time; by default what memory and processors have room for"
    )
    retries: int = Field(
        5,
        ge=0,
        le=1000,
        description="how often a run goes on whose process was killed, before it is given up",
    )


class Processes:
    """Runs tasks in processes of their own. Implements `blockstream.plugins.Scheduler`."""

    def __init__(self, options: ProcessOptions) -> None:
        self.options = options

    def run(self, perform: Callable[[Any], Any], tasks: Iterable[Any], needs: Needs) -> Iterator[Ended]:
        """Yield every task once it has ended; one whose process died is given to another."""
        workers: list[_Worker] = []
        waiting, again = iter(tasks), list[tuple[Any, int]]()
        most = self.options.at_once or room_for(needs)
        try:
            while True:
                while len(workers) < most and (given := _next(again, waiting)) is not None:
                    workers.append(_Worker(perform, *given))
                if not workers:
                    return
                for worker in _ended(workers):
                    ended = worker.taken()
                    if ended is None and worker.tries <= self.options.retries:
                        again.append((worker.task, worker.tries))
                    else:
                        yield ended or worker.lost()
                    given = None if ended is None else _next(again, waiting)
                    if given is not None:
                        worker.give(*given)
                    else:
                        worker.leave()
                        workers.remove(worker)
        finally:
            for worker in workers:
                worker.stop()


def room_for(needs: Needs) -> int:
    """Return how many runs this machine has room for at a time, one at least; one on a device."""
    if needs.device_nbytes:
        return 1
    by_processors = cpu_count().threads // needs.threads
    by_memory = 1 if needs.nbytes is None else headroom().nbytes // needs.nbytes
    return max(1, min(by_processors, by_memory))


class _Worker:
    """A process with a task in hand."""

    def __init__(self, perform: Callable[[Any], Any], task: Any, tries: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, perform), daemon=True)
        self.process.start()
        theirs.close()
        self.give(task, tries)

    def give(self, task: Any, tries: int) -> None:
        """Hand the process a task that was tried so often before."""
        self.task, self.tries = task, tries + 1
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionError):
            return  # it has died: its end is seen next

    def taken(self) -> Ended | None:
        """Return its task as it ended, None where the process has died over it."""
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        return Ended(self.task, result, f"process {self.process.pid}")

    def lost(self) -> Ended:
        """Return the task that was given up."""
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Ended(self.task, lost=f"its process died ({how}), {self.tries} times in all")

    def leave(self) -> None:
        """Let an idle process, or what is left of a dead one, go."""
        self.connection.close()
        self.process.join(LEAVE_S)
        self.stop()

    def stop(self) -> None:
        """End the process whatever it does."""
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(LEAVE_S)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


def _serve(connection: Connection, perform: Callable[[Any], Any]) -> None:
    """Perform what comes until nothing more does. In the worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who schedules is told, and ends this
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        result = perform(task)
        try:
            connection.send(result)
        except (BrokenPipeError, ConnectionError):
            return


def _next(again: list[tuple[Any, int]], waiting: Iterator[Any]) -> tuple[Any, int] | None:
    """Return the next task and how often it was tried; those that go on come first."""
    if again:
        return again.pop(0)
    return next(((task, 0) for task in waiting), None)


def _ended(workers: list[_Worker]) -> list[_Worker]:
    """Wait until some have an answer or have died; return them."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]
