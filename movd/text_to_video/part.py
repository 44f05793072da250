"""One network's checkpoint: its configuration read, its keys checked, its identity known.

Nothing but headers is read here. Modules are built without their weights.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.module.dtypes import parse_dtype, to_torch
from blockstream.module.empty import empty
from blockstream.plugins import Network, Run
from blockstream.run.identity import identity_of
from blockstream.streaming.model_plan import imagined_model, unstored
from blockstream.system import regular
from blockstream.system.machine import versions
from movd.official import check_keys
from movd.text_to_video.prompt_options import CheckpointOptions

log = logging.getLogger(__name__)

#: Weights alone, as Tencent ships them: found where a folder has nothing else.
_TORCH = ("*.pt", "*.pth")


def as_it_is(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose names are its module's."""
    return checkpoint


@dataclass
class NetworkPart:
    """A network of a family: where it lies, what it is, how its tensors become the module's.

    `build(config)` makes the module that a checkpoint is held to; `entries` gives a checkpoint the
    module's names, `open` is the run's way to a checkpoint.
    """

    name: str
    path: Path
    config: dict[str, Any]
    build: Callable[[Mapping[str, Any]], nn.Module]
    entries: Callable[[Checkpoint], Checkpoint] = as_it_is
    dtype: str | None = None
    is_imagined: bool = False
    open: Callable[[Path], Checkpoint] = Checkpoint.open

    @cached_property
    def raw(self) -> Checkpoint:
        """Return the checkpoint as it is published; headers alone are read."""
        with self.blamed():
            return self.open(weights_in(self.path))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint under the module's names, held to the module's shapes."""
        with self.blamed(), empty():
            whole = self.build(self.config)
        if self.is_imagined:
            return imagined_model(whole, self.dtype or "fp32", self.path)
        with self.blamed():
            found = self.entries(self.raw)
            if self.dtype == "int8" and not found.scales:
                raise CheckpointError(
                    f"holds no weights in int8; `blockstream pack {self.path} DST --dtype int8` writes them"
                )
            scales = found.scales
            shapes = {name: entry.shape for name, entry in found.entries.items() if name not in scales}
            check_keys(whole, shapes, what=f"{self.name} {self.path}")
            return found

    def network(self, module: Callable[[], nn.Module] | None = None) -> Network:
        """Return the network, of another module that takes some of the same weights where one is given."""
        checkpoint = self.checkpoint
        with self.blamed(), empty():
            built = self.build(self.config) if module is None else module()
        if self.is_imagined:
            unstored(built)
        return Network(built.eval(), checkpoint, None if self.dtype == "int8" else self.dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that one of the module's tensors has in memory."""
        named = None if self.dtype == "int8" else parse_dtype(self.dtype)
        return to_torch(named or self.checkpoint[name].dtype)

    @cached_property
    def identity(self) -> str:
        """Return what tells these weights from others, wherever they lie."""
        if self.is_imagined:
            return "imagined"
        return identity_of(self.raw, json.dumps(self.config, sort_keys=True, default=str))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Tell errors in the block with the option's name and the path."""
        try:
            yield
        except (ConfigError, CheckpointError) as error:
            said = str(error).removeprefix(str(self.path)).lstrip(": ")
            raise type(error)(f"{self.name} {self.path}: {said}") from error


def weights_in(path: Path) -> Path:
    """Return what to open of a path: a folder, or the one torch file in a folder that has no other form."""
    if not path.is_dir():
        return path
    others = [p for pattern in ("*.safetensors", "*.bin", "*.json") for p in path.glob(pattern)]
    if any(
        p.suffix != ".json" or p.name.endswith("index.json") or p.name == "blockstream.json" for p in others
    ):
        return path
    found = sorted(p for pattern in _TORCH for p in path.glob(pattern))
    return found[0] if len(found) == 1 else path


def open_part(
    name: str,
    options: CheckpointOptions | None,
    fallback: Path | None,
    build: Callable[[Mapping[str, Any]], nn.Module],
    entries: Callable[[Checkpoint], Checkpoint] = as_it_is,
    *,
    released: Mapping[str, Any],
    run: Run,
) -> NetworkPart:
    """Return the part that options name, else that in a model's own folder.

    A checkpoint without a config.json is taken for the `released` one; in a plan that stands for one
    that is not there. Raises ConfigError for a path that is not there.
    """
    path = Path(options.path) if options is not None else fallback
    dtype = options.dtype if options is not None else None
    assert path is not None
    if not path.exists():
        if not run.planning:
            raise ConfigError(f"{name}: {path} does not exist; name the folder of the checkpoint")
        log.warning("%s: %s does not exist: planned with the released network", name, path)
        return NetworkPart(name, path, dict(released), build, entries, dtype or "bf16", is_imagined=True)
    config = _config(name, path, released)
    return NetworkPart(name, path, config, build, entries, dtype, open=run.checkpoint)


def _config(name: str, path: Path, released: Mapping[str, Any]) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not os.path.lexists(file):  # a link that leads nowhere is not a config that was left out
        return dict(released)
    try:
        found = regular.read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: {file} does not hold a configuration but {type(found).__name__}")
    return found


def computed_on(run: Run) -> dict[str, str]:
    """Return what a result's bits follow from of what computes it."""
    device = run.config.device
    if device not in ("auto", "cpu") and torch.cuda.is_available():
        device = torch.cuda.get_device_name(torch.device(device))
    return {"device": device, "cpu": torch.backends.cpu.get_cpu_capability()}


def about_text(run: Run, part: NetworkPart, tokenizer: Callable[[], str], length: int) -> dict[str, Any]:
    """Return what the embeddings of a text encoder follow from beside the text; `length` in tokens."""
    installed = versions()
    return {
        "part": part.name,
        "weights": part.identity,
        "tokenizer": None if part.is_imagined else tokenizer(),
        "length": length,
        "dtype": part.dtype,
        "threads": run.config.threads,
        **computed_on(run),
        "versions": [installed["torch"], installed["transformers"]],
        **({"int8": run.config.int8} if part.dtype == "int8" else {}),
        **({} if run.backend_identity is None else {"backend": run.backend_identity}),
    }


def beside(path: Path, *names: str) -> Path:
    """Return the first of some folders that is there: inside a checkpoint's folder, or next to it.

    The checkpoint's own folder where there is none.
    """
    folder = path if path.is_dir() else path.parent
    for name in names:
        for found in (folder / name, folder.parent / name):
            if found.is_dir():
                return found
    return folder
