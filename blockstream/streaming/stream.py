"""The calls most users need: stream one module, open a session, take a folder as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import ModelError
from blockstream.module.dtypes import parse_dtype, to_torch
from blockstream.module.pretrained import from_folder
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes

from .session import Session

P = ParamSpec("P")
T = TypeVar("T")


class Streaming(AbstractContextManager[T]):
    """What `stream` and its like return: the model is there inside a `with`, and there alone."""

    def __init__(self, name: str, inner: AbstractContextManager[T]) -> None:
        self._name, self._inner = name, inner

    def __enter__(self) -> T:
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


def _entered(function: Callable[P, Iterator[T]]) -> Callable[P, Streaming[T]]:
    """Make a generator function a context manager that says so when it is used as a model."""
    manager = contextmanager(function)

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Streaming[T]:
        return Streaming(function.__name__, manager(*args, **kwargs))

    return make


def open(
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
    *,
    device: str | None = None,
    device_budget: int | str | None = None,
) -> Session:
    """Open a session: stages that share a schedule, a budget and a ledger. Use it in a `with`."""
    return Session(budget, arena, policy, device=device, device_budget=device_budget)


@_entered
def stream(
    model: Any,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
    dtype: Any = None,
    example_inputs: Any = None,
    passes: int | Passes | None = None,
    device: str | None = None,
    device_budget: int | str | None = None,
) -> Iterator[nn.Module]:
    """Yield the module of `model` with its weights streamed from `checkpoint` as it runs.

    `model`: a module built under `empty()`, a factory, or (class, config). `checkpoint`: a file or
    folder of safetensors or torch zip files, or a pack. The forward is unchanged and so is its
    result, bit for bit; leaving the block restores the module. With `device="cuda"` it computes there:
    inputs are moved, outputs are there, and `device_budget` bounds what is held. See `Session` for the rest.
    """
    with Session(budget, arena, policy, device=device, device_budget=device_budget) as s:
        yield s.stage("model", model, checkpoint, passes, dtype, example_inputs)


@_entered
def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
    dtype: Any = None,
    example_inputs: Any = None,
    passes: int | Passes | None = None,
    device: str | None = None,
    device_budget: int | str | None = None,
    variant: str | None = None,
) -> Iterator[nn.Module]:
    """Yield the model of a transformers or diffusers folder, or of a hub's id in the local cache, streamed.

    The class is the one its config.json names, if the installed library has it; code in the folder
    is never run. Dtypes, buffers and generation settings are what that library's `from_pretrained` gives;
    `variant` ("fp16") names one of several sets of weights.
    """
    checkpoint = Checkpoint.open(folder, variant)
    made = from_folder(folder, parse_dtype(dtype), checkpoint)
    with stream(
        made,
        checkpoint,
        budget=budget,
        arena=arena,
        policy=policy,
        dtype=made.dtype and to_torch(made.dtype),
        example_inputs=example_inputs,
        passes=passes,
        device=device,
        device_budget=device_budget,
    ) as module:
        yield module
