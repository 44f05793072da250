"""The sessions open in this process: which one streams a module, and what the others will still take."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

from torch import nn

from blockstream.errors import BudgetError, ModelError
from blockstream.module.adapters import base_of


class OpenSession(Protocol):
    """What sessions know of one another."""

    @property
    def budget(self) -> int | str | None:
        """Return the budget as it was named, None where none was."""

    @property
    def untouched_nbytes(self) -> int:
        """Return the bytes of the arena that are planned and not touched yet."""

    def fork(self) -> None:
        """Take note, in a forked child, that what was loaded is the parent's."""


_of_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_running: weakref.WeakSet[Any] = weakref.WeakSet()


def _fork_all() -> None:
    for each in list(_running):
        each.fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)


def opened(session: OpenSession, has_arena: bool) -> None:
    """Take note of a session that opens; BudgetError where it names another budget than one that is open.

    A process has one budget; a session that `has_arena` counts what it holds by itself.
    """
    if session.budget is not None and not has_arena:
        for other in _running:
            if other.budget is not None and other.budget != session.budget:
                raise BudgetError(
                    f"a session with budget {other.budget!r} is open in this process and another names "
                    f"{session.budget!r}; name none to join it, or give this one an arena"
                )
    _running.add(session)


def closed(session: OpenSession) -> None:
    """Take note that a session has closed."""
    _running.discard(session)


def others_nbytes(session: OpenSession) -> int:
    """Return the bytes that all other sessions have planned and will still touch."""
    return sum(s.untouched_nbytes for s in _running if s is not session)


def claim(module: nn.Module, session: OpenSession) -> None:
    """Make a session the one that streams a module."""
    _of_module[module] = weakref.ref(session)


def release(module: nn.Module) -> None:
    """Give a module back. Idempotent."""
    _of_module.pop(module, None)


def refuse_claimed(module: nn.Module) -> None:
    """Raise ModelError if a module is being streamed."""
    if module in _of_module:
        raise ModelError(f"{type(module).__name__} is already being streamed; a module is one stage")


def find(module: nn.Module) -> Any:
    """Return the session that streams a module; ModelError if none does."""
    found = _of_module.get(base_of(module))
    alive = found() if found is not None else None
    if alive is None:
        raise ModelError(f"{type(module).__name__} is not being streamed; open it with blockstream.stream()")
    return alive
