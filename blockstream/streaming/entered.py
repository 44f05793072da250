"""Context managers that say what they are when they are used as the model they yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from blockstream.errors import ModelError

P = ParamSpec("P")
T = TypeVar("T")


class Streaming(AbstractContextManager[T]):
    """What `stream` and its like return: the model is there inside a `with`, and there alone."""

    def __init__(self, name: str, inner: AbstractContextManager[T]) -> None:
        self._name, self._inner, self._was_entered = name, inner, False

    def __enter__(self) -> T:
        if self._was_entered:
            raise ModelError(
                f"what blockstream.{self._name}() returned was entered before; call it again for each `with`"
            )
        self._was_entered = True
        return self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._inner.__exit__(*error)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say how to get at the model."""
        self._refuse("called")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"asked for {name!r}")

    def _refuse(self, how: str) -> NoReturn:
        raise ModelError(
            f"what blockstream.{self._name}() returns was {how} and is no model yet: write "
            f"`with blockstream.{self._name}(...) as model:` and use the model inside"
        )


def entered(function: Callable[P, Iterator[T]]) -> Callable[P, Streaming[T]]:
    """Make a generator function a context manager that says so when it is used as a model."""
    manager = contextmanager(function)

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Streaming[T]:
        return Streaming(function.__name__, manager(*args, **kwargs))

    return make
