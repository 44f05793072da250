"""What may change while a run goes on and plugins may read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class RunContext:
    """The sampler's step and their number."""

    step: int | None = None
    steps: int | None = None


_current: ContextVar[RunContext | None] = ContextVar("blockstream_run", default=None)


def current_run() -> RunContext:
    """Return the context of the run in progress; one is begun when there is none."""
    context = _current.get()
    if context is None:
        context = RunContext()
        _current.set(context)
    return context


@contextmanager
def new_run() -> Iterator[RunContext]:
    """Begin a context of its own for the length of the block."""
    token = _current.set(RunContext())
    try:
        yield current_run()
    finally:
        _current.reset(token)
