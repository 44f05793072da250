"""What a run leaves on disk as it goes: each prompt's folder, its latents, and the state it resumes from.

A prompt is done with a stage when the stage's file is there, and files appear whole or not at all. So what
there is left to do follows from the folder alone, wherever a run was stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blockstream.errors import CheckpointError, ConfigError
from blockstream.run.outputs import STATE, write_atomic, write_json

log = logging.getLogger(__name__)

LATENTS = "latents.safetensors"
VIDEO, IMAGE = "video.mp4", "image.png"
SCHEMA = 1


@dataclass(frozen=True)
class Step:
    """Where a sampler was: the index it goes on from, and what it and the flow remember."""

    index: int
    z: Tensor
    memory: Mapping[str, Any] | None
    flow: Mapping[str, Any]


class Progress:
    """The folders of a run's prompts: `out` itself for one, out/0000, out/0001, ... for several.

    Nothing is looked for in a folder that is not `resumed`.
    """

    def __init__(self, out: Path, prompts: int, resumed: bool = False) -> None:
        self._out = out
        self._several = prompts > 1
        self.resumed = resumed
        self.state = out / STATE

    def folder(self, n: int) -> Path:
        """Return the folder of prompt `n`."""
        return self._out / f"{n:04d}" if self._several else self._out

    def begin(self, about: Mapping[str, Mapping[str, str | None]]) -> None:
        """Note what the run's bits follow from beside its config, or check that it is what it was.

        `about`: names and values under "inputs", which must be the same, and "versions", which should.
        """
        path = self.state / "run.json"
        if self.resumed and path.is_file():
            with _sound(path):
                was = json.loads(path.read_text(encoding="utf-8"))
            _compare(was, about, self._out)
        else:
            self.state.mkdir(parents=True, exist_ok=True)
            write_json(path, {"schema": SCHEMA, **about})

    def finish(self) -> None:
        """Remove the state: the results are all there."""
        shutil.rmtree(self.state, ignore_errors=True)

    # -- results -----------------------------------------------------------------------------

    def result(self, n: int) -> Path | None:
        """Return the video or image of prompt `n`, None while there is none."""
        found = [self.folder(n) / name for name in (VIDEO, IMAGE)]
        return next((p for p in found if self.resumed and p.is_file()), None)

    def target(self, n: int, name: str) -> Path:
        """Return where a result of prompt `n` goes; its folder is made."""
        self.folder(n).mkdir(parents=True, exist_ok=True)
        return self.folder(n) / name

    def has_latents(self, n: int) -> bool:
        """Return whether prompt `n` is denoised."""
        return self.resumed and (self.folder(n) / LATENTS).is_file()

    def save_latents(self, n: int, z: Tensor, about: Mapping[str, Any]) -> None:
        """Write the latents [1, 4, T', h, w] of prompt `n`, all or nothing; its step goes."""
        metadata = {"about": json.dumps(dict(about))}
        write_atomic(self.target(n, LATENTS), save({"z": z.contiguous()}, metadata))
        self._step(n).unlink(missing_ok=True)

    def latents(self, n: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the latents of prompt `n` and what was said about them."""
        path = self.folder(n) / LATENTS
        with _sound(path), safe_open(path, framework="pt") as file:
            return _read(file, "z"), json.loads(file.metadata()["about"])

    # -- state -------------------------------------------------------------------------------

    def save_step(self, n: int, step: Step) -> None:
        """Write where the sampler is with prompt `n`.

        Raises ConfigError for a sampler's memory that is not of tensors and numbers.
        """
        tensors: dict[str, Tensor] = {}
        values = {"index": step.index, "z": step.z, "memory": step.memory, "flow": step.flow}
        tree = {name: _pack(value, name, tensors) for name, value in values.items()}
        write_atomic(self._step(n), save(tensors, {"state": json.dumps(tree)}))

    def step(self, n: int) -> Step | None:
        """Return where prompt `n` was left, None if it was not begun."""
        path = self._step(n)
        if not self.resumed or not path.is_file():
            return None
        with _sound(path), safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["state"])
            return Step(**{name: _unpack(value, file) for name, value in tree.items()})

    def save_tensor(self, name: str, value: Tensor) -> None:
        """Write a tensor that prompts share."""
        write_atomic(self.state / f"{name}.safetensors", save({"value": value.contiguous()}))

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor that prompts share, None before it is made."""
        path = self.state / f"{name}.safetensors"
        if not path.is_file():
            return None
        with _sound(path), safe_open(path, framework="pt") as file:
            return _read(file, "value")

    def _step(self, n: int) -> Path:
        return self.state / f"{n:04d}.safetensors"


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Name a file that cannot be read and say what to do."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to have it made again") from error


def _read(file: Any, name: str) -> Tensor:
    """Return a tensor in memory of its own, aligned as a computed one is: kernels differ with the address."""
    return file.get_tensor(name).clone()


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON holds it; its tensors are put aside by the path they lie at.

    A tensor keeps its order in memory, on which a kernel, and so a bit, may depend.
    """
    if isinstance(value, Tensor):
        axes = sorted(range(value.dim()), key=lambda i: -value.stride(i))
        tensors[where] = value.detach().cpu().permute(axes).clone(memory_format=torch.contiguous_format)
        return {"tensor": where, "axes": axes}
    if isinstance(value, Mapping):
        return {"map": {str(k): _pack(v, f"{where}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, f"{where}.{k}", tensors) for k, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(
        f"the sampler's {where} is {type(value).__name__}; what is to be saved must be tensors and numbers"
    )


def _unpack(value: Any, file: Any) -> Any:
    """Return what `_pack` made JSON of."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        axes = value["axes"]
        return _read(file, value["tensor"]).permute([axes.index(i) for i in range(len(axes))])
    if "map" in value:
        return {key: _unpack(item, file) for key, item in value["map"].items()}
    return [_unpack(item, file) for item in value["list"]]


def _compare(was: Mapping[str, Any], now: Mapping[str, Mapping[str, str | None]], out: Path) -> None:
    """Refuse inputs that are not those a run began with; warn of versions that are not."""
    changed = {
        kind: [name for name, value in now[kind].items() if was.get(kind, {}).get(name, value) != value]
        for kind in now
    }
    if changed["inputs"]:
        raise ConfigError(
            f"{out} was begun with another {', another '.join(changed['inputs'])}: its rest would not belong "
            "to its beginning; put the old one back, or start again with --overwrite"
        )
    for name in changed["versions"]:
        log.warning(
            "%s was begun with %s %s and goes on with %s: the last bits may differ from those of a run "
            "that was never stopped",
            *(out, name, was["versions"][name], now["versions"][name]),
        )
