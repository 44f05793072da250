"""Plan one model by itself, from whatever there is of it: a folder, a config.json, a family's name, headers.

Nothing but headers and configs is read. Where there are no weights they are imagined from the module's
own parameters; where there is no config, segments are told from the tensors' names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from blockstream.budget.amounts import parse_nbytes, resolve_budget
from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.checkpoint.read.entries import ITEM_NBYTES, FileStamp
from blockstream.checkpoint.write.rounding import SCALE
from blockstream.errors import ModelError
from blockstream.module.architectures import find
from blockstream.module.dtypes import to_torch
from blockstream.module.empty import build
from blockstream.module.pretrained import from_folder
from blockstream.module.spec import packing, tensor_spec
from blockstream.module.threads import use_threads
from blockstream.report.forecast import plan_account
from blockstream.report.items import predicted_items
from blockstream.run.config import Amount
from blockstream.run.validation import raise_problems, validate
from blockstream.run.yamlfile import Document, with_set
from blockstream.system.memory import held, trim_heap

from .options import MOST_PASSES, parse_policies
from .session import Session
from .shelves import experts_account

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


class Options(BaseModel):
    """What --set may set for a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: int | None = Field(None, ge=1, le=MOST_PASSES, description="forwards; unknown without")
    budget: Amount = Field("auto", description="limit on the memory of the process")
    arena: Amount = Field("auto", description="most bytes of weights held at once")
    policy: Literal["auto", "none", "prefix", "spread"] = Field("auto", description="what stays in memory")
    dtype: Literal["fp32", "bf16", "fp16", "int8"] | None = Field(None, description="dtype of the weights")
    threads: int | None = Field(None, ge=1, description="threads that compute")


def plan_model(ref: str, sets: list[str]) -> dict[str, Any]:
    """Return what `plan --json` prints for one model; `sets` as in `Options`.

    Raises ConfigError for an unknown name or option, CheckpointError for files that are not what they say.
    """
    options = _options(ref, sets)
    if options.threads is not None:
        use_threads(options.threads)
    arena = None if options.arena == "auto" else parse_nbytes(options.arena)
    path = Path(ref)
    with Session(options.budget, arena, options.policy) as session:
        module, checkpoint = _model(ref, options.dtype or "fp32")
        dtype = None if options.dtype == "int8" else options.dtype
        session.stage(path.stem if path.exists() else ref, module, checkpoint, options.passes, dtype)
        trim_heap()  # what it took to build the module, as a run's start gives it back
        return plan_account(
            made := session.draft(),
            predicted_items(0.0, {s.name: s.wall_s for s in made.predicted.stages}, 0.0)[1:-1],
            parse_policies(options.policy),
            session.costs_from,
            runtime_nbytes=held().nbytes,
            activations_beside=session.activations_beside,
            budget_nbytes=resolve_budget(options.budget).nbytes,
            arena_nbytes=arena,
            finest_arena_nbytes=session.finest_arena_nbytes,
            experts=experts_account(session.prepared, session.facts),
        )


def _options(ref: str, sets: list[str]) -> Options:
    document = Document(ref, {})
    for text in sets:
        document = with_set(document, text)
    options, problems = validate(Options, document.data)
    raise_problems(document, problems)
    assert options is not None
    return options


def _model(ref: str, dtype: str) -> tuple[nn.Module, Checkpoint]:
    """Return a model's module and its weights: found, or imagined in a dtype, or told from headers.

    `dtype` is the one for what is imagined.
    """
    path = Path(ref)
    if path.exists() and not path.is_dir() and path.suffix != ".json":
        checkpoint = Checkpoint.open(path)
        if checkpoint.form == "gguf":
            try:
                return build(from_folder(path, None, checkpoint)), checkpoint
            except ModelError:
                pass
        return skeleton(checkpoint), checkpoint
    folder = path if path.is_dir() else path.parent
    there = path.exists() and any(p.suffix in (".safetensors", ".bin") for p in folder.iterdir())
    try:
        module = find(ref).module()
    except ModelError:
        if not there:
            raise
        checkpoint = Checkpoint.open(folder)
        return skeleton(checkpoint), checkpoint
    if there:
        return module, Checkpoint.open(folder)
    return module, imagined_model(module, dtype, folder / "weights")


def imagined(spec: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> Checkpoint:
    """Return the checkpoint these dtypes and shapes would make; nothing can be read from it."""
    total = sum(prod(shape) * ITEM_NBYTES[dtype] for dtype, shape in spec.values())
    digest = hashlib.sha256(repr(sorted(spec.items())).encode()).hexdigest()
    stamp = FileStamp(path, total, 0, 0, 0, digest)
    entries, offset = {}, 0
    for name, (dtype, shape) in spec.items():
        nbytes = prod(shape) * ITEM_NBYTES[dtype]
        entries[name] = TensorEntry(name, dtype, tuple(shape), stamp, offset, nbytes)
        offset += nbytes
    return Checkpoint(path, "safetensors", entries)


def imagined_model(module: nn.Module, dtype: str, path: Path) -> Checkpoint:
    """Return the checkpoint a module would have in a dtype (fp32, bf16, fp16, int8), to plan with.

    Its stored buffers, which would be read at once, count as none from here on.
    """
    unstored(module)
    whole = imagined(tensor_spec(module, _DTYPES.get(dtype) or "F32"), path)
    if dtype != "int8":
        return whole
    rounded = packing(module, whole, "int8").int8
    spec: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in whole.entries.items():
        spec[name] = ("I8" if name in rounded else entry.dtype, entry.shape)
        if name in rounded:
            spec[name + SCALE] = ("F32", entry.shape[:1])
    return imagined(spec, path)


def unstored(module: nn.Module) -> None:
    """Have nothing read for a module's stored buffers."""
    for part in module.modules():
        part._non_persistent_buffers_set.update(part._buffers)


class _Bones(nn.Module):
    """A module told from names: where it is one that computes cannot be known, so it counts as one."""

    def forward(self, *args: Any) -> Any:
        """Refuse: there is nothing to run."""
        raise ModelError("a model told from its tensors' names can be planned, and not run")


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return a module of a checkpoint's tensors, on meta: its blocks can be found, it cannot run."""
    root: nn.Module = _Bones()
    for name, entry in checkpoint.entries.items():
        *path, last = name.split(".")
        module = root
        for part, below in zip(path, [*path[1:], last], strict=True):
            if part not in module._modules:
                module.add_module(part, nn.ModuleDict() if below.isdigit() else _Bones())
            module = module.get_submodule(part)
        dtype = torch.float32 if entry.coded is not None else to_torch(entry.dtype)
        empty = torch.empty(entry.shape, dtype=dtype, device="meta")
        module.register_parameter(last, nn.Parameter(empty, requires_grad=False))
    return root
