"""Loops over a long axis in chunks, cut short where a forward is run for its memory alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_sizing: ContextVar[bool] = ContextVar("blockstream_sizing", default=False)


def chunks(length: int, step: int) -> Iterator[slice]:
    """Yield slices of at most `step` that cover `length`, for a module that computes chunk by chunk.

    While a forward is only sized, without data, they are the first two: those after them need what the
    second does, beside what the first left.
    """
    for start in range(0, min(length, 2 * step) if _sizing.get() else length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def sizing() -> Iterator[None]:
    """Say, for the length of the block, that forwards run for their memory alone."""
    token = _sizing.set(True)
    try:
        yield
    finally:
        _sizing.reset(token)
