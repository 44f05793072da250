"""A scheduler in this process, and chores for the processes of another: some kill what runs them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from blockstream.plugins import Ended


class InTurn:
    """Runs tasks in this process, in turn; with `deaths` it dies over a task so often after it was done."""

    def __init__(self, deaths: int = 0) -> None:
        self.deaths, self.performed, self.needs = deaths, [], None

    def run(self, perform, tasks, needs):
        self.needs = needs
        for task in tasks:
            self.performed.append(task.name)
            for _ in range(self.deaths):
                perform(task)  # and nobody hears of it
            yield Ended(task, perform(task), "here")


class Chore:
    """Notes each task it is given; dies over those that begin with "die", or those tried `deaths` times."""

    def __init__(self, folder: Path, deaths: int = 1) -> None:
        self.folder, self.deaths = folder, deaths

    def __call__(self, task: str) -> str:
        with (self.folder / task).open("a") as file:
            file.write("x")
        if task.startswith("die") and (self.folder / task).stat().st_size <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return task.upper()
