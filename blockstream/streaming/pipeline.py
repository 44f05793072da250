"""Stream a whole pipeline of diffusers: its networks are stages of one schedule under one budget."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.dduf import Archive, is_dduf
from blockstream.checkpoint.read.index import read_json
from blockstream.checkpoint.read.locate import located
from blockstream.errors import ModelError
from blockstream.module.dtypes import FROM_TORCH, parse_dtype, to_torch
from blockstream.module.pretrained import from_folder
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes

from .entered import entered
from .session import Session

INDEX = "model_index.json"
#: In which turn networks run, by how their names begin; what is named otherwise denoises.
_TURNS = (
    "text_encoder",
    "image_encoder",
    "prior",
    "controlnet",
    "unet",
    "transformer",
    "vae",
    "vqvae",
    "vocoder",
    "safety_checker",
)


@entered
def pipeline(
    folder_or_pipe: Any,
    *,
    budget: int | str | None = None,
    arena: int | str | None = None,
    policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
    dtype: Any = None,
    variant: str | None = None,
    device: str | None = None,
    device_budget: int | str | None = None,
) -> Iterator[Any]:
    """Yield a pipeline of diffusers whose networks are streamed as it calls them.

    `folder_or_pipe`: a folder that has a model_index.json, a hub's id in the local cache, a DDUF file, or a
    pipeline made from a folder. Every network is a stage that runs as often as the pipeline calls it;
    schedulers, tokenizers, callbacks, tiling and the call's own arguments are the pipeline's. `dtype` is one
    for all networks, or a mapping by their names with "default" for the rest; without one they are loaded as
    the library does. Code in the folder is never run. See `stream` for the rest.
    """
    with Session(budget, arena, policy, device=device, device_budget=device_budget) as session:
        if isinstance(folder_or_pipe, str | os.PathLike):
            yield assemble(session, folder_or_pipe, dtype, variant)
        else:
            yield _of_pipe(session, folder_or_pipe, dtype, variant)


def assemble(
    session: Session,
    folder: str | os.PathLike[str],
    dtype: Any = None,
    variant: str | None = None,
    *,
    opened: Callable[[Path], Checkpoint] | None = None,
    passes: Callable[[str], Passes | None] | None = None,
) -> Any:
    """Return the pipeline of a folder, or a DDUF file, its networks stages of a session that has not begun.

    `opened` opens the checkpoint of a network's folder where that is not as `variant` says; `passes` tells by
    a network's name how often it will run, unknown without. See `pipeline` for the rest.
    """
    found = located(folder)
    if is_dduf(found):
        archive = Archive.open(found)
        with TemporaryDirectory() as small:  # settings and tokenizers: weights are read in place
            archive.extract(Path(small))
            return _built(
                session, Path(small), dtype, lambda path: archive.checkpoint(path.name, variant), passes
            )
    if opened is None:
        opened = partial(Checkpoint.open, variant=variant)
    return _built(session, found, dtype, opened, passes)


def _built(
    session: Session,
    folder: Path,
    dtype: Any,
    opened: Callable[[Path], Checkpoint],
    passes: Callable[[str], Passes | None] | None,
) -> Any:
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder}: has no {INDEX}; for one model use blockstream.from_pretrained()")
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{path}: names no pipeline in _class_name; fetch it again")
    cls = _attribute(path, "diffusers", index["_class_name"])
    parts: dict[str, Any] = {}
    networks: dict[str, type] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            if not name.startswith("_"):
                parts[name] = value
            continue
        if len(value) != 2 or value[1] is None:
            parts[name] = None
            continue
        kind = _attribute(path, *map(str, value))
        if issubclass(kind, nn.Module):
            networks[name] = kind
        else:
            parts[name] = kind.from_pretrained(folder / name, local_files_only=True)
    for name in sorted(networks, key=_turn):
        checkpoint = opened(folder / name)
        made = from_folder(folder / name, _dtype_of(dtype, name) or "F32", checkpoint, networks[name])
        parts[name] = session.stage(
            name,
            made,
            checkpoint,
            passes=None if passes is None else passes(name),
            dtype=made.dtype and to_torch(made.dtype),
        )
    try:
        return cls(**parts)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {cls.__name__} cannot be built from it ({error})") from error


def _of_pipe(session: Session, pipe: Any, dtype: Any, variant: str | None) -> Any:
    """Stream the networks of a pipeline that is there, from the folder that it was made from."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ModelError(
            f"blockstream.pipeline() takes a folder or a pipeline of diffusers, not {type(pipe).__name__}"
        )
    folder = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not folder:
        raise ModelError(
            f"{type(pipe).__name__} does not say which folder it was made from; name that folder instead"
        )
    networks = {n: m for n, m in components.items() if isinstance(m, nn.Module)}
    for name in sorted(networks, key=_turn):
        if next(networks[name].parameters(), None) is None:
            continue
        own = FROM_TORCH.get(next(networks[name].parameters()).dtype)
        checkpoint = Checkpoint.open(located(folder) / name, variant)
        wanted = to_torch(_dtype_of(dtype, name) or own or "F32")
        session.stage(name, networks[name].eval(), checkpoint, passes=None, dtype=wanted)
    return pipe


def _turn(name: str) -> tuple[int, str]:
    turns = [i for i, prefix in enumerate(_TURNS) if name.startswith(prefix)]
    return (turns[0] if turns else _TURNS.index("unet"), name)


def _dtype_of(dtype: Any, name: str) -> str | None:
    return parse_dtype(dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype)


def _attribute(path: Path, library: str, name: str) -> Any:
    """Return a class that an index names: of a library, or of one of diffusers' own pipelines."""
    for module in (library, f"diffusers.pipelines.{library}"):
        if module.partition(".")[0] not in ("diffusers", "transformers"):
            continue
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    raise ModelError(
        f"{path}: names {name} of {library}, which is not installed; code of the folder's own is not run"
    )
