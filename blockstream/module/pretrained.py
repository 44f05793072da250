"""Build the model a transformers or diffusers folder describes. Code in the folder is never run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.index import read_json
from blockstream.checkpoint.read.locate import located
from blockstream.errors import BlockstreamError, ModelError

from .dtypes import COMPUTED, FROM_TORCH, to_torch
from .libraries import build_in

#: What a model's folder calls its settings.
CONFIG = "config.json"


#: Settings that say how many there are of something that has tensors of its own, and how large something is.
_COUNT = re.compile(r"(^|_)(n|num)_.*(layer|block)s?$|(^|_)depths?$|^(num_)?layers$")
_SIZE = re.compile(r"size|dim|width|head|position|channel|length|expert|vocab|layer|block|depth|feature")
#: The largest size that a setting names in any published model is far below.
MOST_SIZE = 10**8


@dataclass(frozen=True)
class Pretrained:
    """A factory of the model that a config.json names, and the dtype its library would load it in.

    `dtype` is a safetensors name; None where the files' own dtypes are as good.
    """

    make: Callable[[], nn.Module]
    dtype: str | None = None

    def __call__(self) -> nn.Module:
        """Return the model; its parameters are on meta under `empty()`."""
        return self.make()


def from_folder(
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    checkpoint: Checkpoint | None = None,
    cls: Any = None,
) -> Pretrained:
    """Return a factory of the model that a folder's config.json names, as `from_pretrained` would load it.

    `dtype` is the one asked for; `checkpoint` holds the weights, and bounds what is built; `cls` is the
    class, where another file names it. Raises ModelError naming the class when no installed library has it.
    """
    found = located(folder)
    if checkpoint is not None and checkpoint.form == "gguf":
        return _of_gguf(found, dtype, checkpoint, cls)
    path = (found if found.is_dir() else found.parent) / CONFIG
    if not path.exists():
        raise ModelError(
            f"{folder}: has no {CONFIG}{'' if found.is_dir() else ' beside it'}; pass the model and the "
            "checkpoint to blockstream.stream()"
        )
    return from_config(path, dtype, checkpoint, cls)


def _of_gguf(found: Path, dtype: str | None, checkpoint: Checkpoint, cls: Any) -> Pretrained:
    """Return a factory of the model in a GGUF file.

    A config.json of diffusers beside it says which; else transformers reads its settings out of the file's
    header, and takes float32 where no dtype is named.
    """
    file = next(iter(checkpoint.files)).path
    beside = file.parent / CONFIG
    if beside.exists() and "_class_name" in read_config(beside):
        return from_config(beside, dtype, checkpoint, cls)
    dtype = dtype or "F32"
    with _explained(file, cls or Checkpoint):
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        names = settings.architectures or []
    if cls is None and names:
        cls = _class(file, "transformers", str(names[0]))

    def make() -> nn.Module:
        with _explained(file, cls or AutoModelForCausalLM):
            kind = cls or AutoModelForCausalLM._model_mapping[type(settings)]
            return build_in(kind, settings, to_torch(dtype))

    return Pretrained(make, dtype)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a config.json; raises ModelError for a file of something else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no table of settings; name the config.json of a model")
    return config


def from_config(
    path: Path, dtype: str | None = None, checkpoint: Checkpoint | None = None, cls: Any = None
) -> Pretrained:
    """Return a factory of the model that a config.json names; arguments and errors as of `from_folder`."""
    config = read_config(path)
    _refuse_sizes(path, config, checkpoint)
    if "_class_name" in config:
        return _diffusers(path, config, dtype, cls)
    return _transformers(path, config, dtype, checkpoint, cls)


def _refuse_sizes(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint | None) -> None:
    """Refuse counts and sizes beyond what could be: to build them would take for ever."""
    most = None if checkpoint is None else max(len(checkpoint.entries), 1)
    for key, value in _integers(config):
        if most is not None and value > most and _COUNT.search(key):
            raise ModelError(
                f"{path}: says {key} {value}, and the checkpoint holds {most} tensors in all; is this the "
                "config of another model?"
            )
        if value > MOST_SIZE and _SIZE.search(key):
            raise ModelError(f"{path}: says {key} {value}, more than any model has; fetch the config again")


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield (key, value) of the whole numbers in a config, those of configs and lists within too."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _integers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < inf:
        yield key, int(value)


def _diffusers(path: Path, config: dict[str, Any], dtype: str | None, cls: Any) -> Pretrained:
    cls = cls or _class(path, "diffusers", str(config["_class_name"]))
    settings = {k: v for k, v in config.items() if k != "auto_map"}
    dtype = dtype or "F32"
    wanted = to_torch(dtype)

    def make() -> nn.Module:
        with _explained(path, cls):
            return build_in(cls, settings, wanted)

    return Pretrained(make, dtype)


def _transformers(
    path: Path, config: dict[str, Any], dtype: str | None, checkpoint: Checkpoint | None, cls: Any
) -> Pretrained:
    names = [cls.__name__] if cls else config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise ModelError(
            f"{path}: names no architecture; pass (class, config) to blockstream.stream(), or --model to "
            "blockstream pack"
        )
    cls = cls or _class(path, "transformers", str(names[0]))
    if getattr(cls, "config_class", None) is None:
        raise ModelError(f"{path}: names {names[0]}, which is no model but a base of models")
    with _explained(path, cls):
        settings = cls.config_class.from_pretrained(path, local_files_only=True)
        dtype = dtype or FROM_TORCH.get(_declared(settings)) or _first_dtype(checkpoint)
    wanted = None if dtype is None else to_torch(dtype)

    def make() -> nn.Module:
        with _explained(path, cls):
            module = build_in(cls, settings, wanted)
            _read_generation_config(module, path)
            return module

    return Pretrained(make, dtype if dtype in COMPUTED else None)


def _declared(settings: Any) -> Any:
    """Return the dtype of a config of transformers, as torch has it."""
    declared = getattr(settings, "dtype", None)
    return getattr(torch, declared) if isinstance(declared, str) else declared


def _first_dtype(checkpoint: Checkpoint | None) -> str | None:
    """Return the dtype of the first floating tensor, by which transformers goes where no config says one."""
    names = () if checkpoint is None else checkpoint.names
    dtypes = (checkpoint.entries[name].dtype for name in names if checkpoint is not None)
    return next((dtype for dtype in dtypes if dtype in COMPUTED), None)


def _read_generation_config(module: nn.Module, path: Path) -> None:
    """Give a model that generates the settings of its folder, as its library does."""
    if not getattr(module, "can_generate", lambda: False)():
        return
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except OSError:  # none there: the config of the model may have some of them
        found = GenerationConfig.from_pretrained(
            path.parent, config_file_name=path.name, _from_model_config=True, local_files_only=True
        )
    module.generation_config = found  # type: ignore[assignment]


@contextmanager
def _explained(path: Path, cls: type) -> Iterator[None]:
    """Raise what a library says of settings it cannot use as ModelError that names them."""
    try:
        yield
    except (BlockstreamError, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{path}: {cls.__name__} cannot be built from it ({type(error).__name__}: {first[:300]}); "
            "mend the settings, or fetch the file again"
        ) from error


def _class(path: Path, library: str, name: str) -> Any:
    try:
        module = __import__(library)
    except ImportError as error:
        raise ModelError(f"{path}: {name} is a {library} model and {library} is not installed") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ModelError(
            f"{path}: names {name}, which {library} {module.__version__} does not have; models with code of "
            "their own are not run: build it yourself and pass it to blockstream.stream()"
        )
    return cls
