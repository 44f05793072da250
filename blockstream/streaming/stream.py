"""The calls most users need: stream one module, open a session, take a folder as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes

from .entered import entered
from .session import Session


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


@entered
def stream(
    model: Any,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
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

    `model`: a module built under `empty()`, a factory, (class, config), or a model's folder. `checkpoint`: a
    file or folder of safetensors or torch zip files, or a pack; the model's folder without one. The forward
    is unchanged and so is its result, bit for bit; leaving the block restores the module. With
    `device="cuda"` it computes there: inputs are moved, outputs go back where inputs came from the processor
    alone, and `device_budget` bounds what is held. See `Session` for the rest.
    """
    with Session(budget, arena, policy, device=device, device_budget=device_budget) as s:
        yield s.stage("model", model, checkpoint, passes, dtype, example_inputs)


@entered
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
    with stream(
        folder,
        Checkpoint.open(folder, variant),
        budget=budget,
        arena=arena,
        policy=policy,
        dtype=dtype,
        example_inputs=example_inputs,
        passes=passes,
        device=device,
        device_budget=device_budget,
    ) as module:
        yield module
