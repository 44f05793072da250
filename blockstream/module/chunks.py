"""Loops over a long axis in chunks, cut short where a forward is rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_sizing: ContextVar[bool] = ContextVar("blockstream_sizing", default=False)
_left_out: ContextVar[float] = ContextVar("blockstream_left_out", default=1.0)


def chunks(length: int, step: int) -> Iterator[slice]:
    """Yield slices of at most `step` that cover `length`, for a module that computes chunk by chunk.

    While a forward is only sized, without data, they are the first two: those after them need what the
    second does, beside what the first left, and `left_out` says how much the second stands for.
    """
    for start in range(0, length, step):
        end = min(start + step, length)
        if start != step or end == length or not _sizing.get():
            yield slice(start, end)
            continue
        stands_for = (length - start) / (end - start)
        token = _left_out.set(_left_out.get() * stands_for)
        try:
            yield slice(start, end)
        finally:
            _left_out.reset(token)
        return


def left_out() -> float:
    """Return how many times what is computed now would be, were no chunk left out: 1 while nothing is."""
    return _left_out.get()


@contextmanager
def sizing() -> Iterator[None]:
    """Say, for the length of the block, that forwards run without data."""
    token = _sizing.set(True)
    try:
        yield
    finally:
        _sizing.reset(token)
