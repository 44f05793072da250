"""The calls most users need: stream one module, open a session, take a folder as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.module.pretrained import from_folder
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes

from .session import Session


def open(
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
) -> Session:
    """Open a session: stages that share a schedule, a budget and a ledger. Use it in a `with`."""
    return Session(budget, arena, policy)


@contextmanager
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
) -> Iterator[nn.Module]:
    """Yield the module of `model` with its weights streamed from `checkpoint` as it runs.

    `model`: a module built under `empty()`, a factory, or (class, config). `checkpoint`: a file or
    folder of safetensors or torch zip files, or a pack. The forward is unchanged and so is its
    result, bit for bit; leaving the block restores the module. See `Session` for the rest.
    """
    with Session(budget, arena, policy) as s:
        yield s.stage("model", model, checkpoint, passes, dtype, example_inputs)


@contextmanager
def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
    dtype: Any = None,
    example_inputs: Any = None,
    passes: int | Passes | None = None,
) -> Iterator[nn.Module]:
    """Yield the model of a transformers or diffusers folder, streamed from it.

    The class is the one its config.json names, if the installed library has it; code in the folder
    is never run.
    """
    with stream(
        from_folder(folder),
        folder,
        budget=budget,
        arena=arena,
        policy=policy,
        dtype=dtype,
        example_inputs=example_inputs,
        passes=passes,
    ) as module:
        yield module
