"""Say whose code failed: what a plugin raises becomes a PluginError that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

from blockstream.errors import BlockstreamError, EngineError, PluginError

F = TypeVar("F", bound=Callable[..., object])


@contextmanager
def blaming(who: str, unless: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Turn what the block raises into a PluginError that begins with `who`.

    The package's own errors, raised on purpose, interrupts, and those of which `unless` says that they
    are not theirs pass unchanged. `sys.exit()`, and what else is no `Exception`, is a failure like any other;
    so is the engine used out of order.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        own = isinstance(error, BlockstreamError) and not isinstance(error, EngineError)
        if own or (isinstance(error, Exception) and unless(error)):
            raise
        raise PluginError(f"{who}: {type(error).__name__}: {error}") from error


def blamed(who: str, function: F) -> F:
    """Return the function, its failures blamed on `who`, which it has as an attribute."""

    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        with blaming(who):
            return function(*args, **kwargs)

    call.who = who  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
