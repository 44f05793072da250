"""Build the model a transformers or diffusers folder describes. Code in the folder is never run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from blockstream.checkpoint.read.index import read_json
from blockstream.errors import ModelError

#: What a model's folder calls its settings.
CONFIG = "config.json"


def from_folder(folder: str | os.PathLike[str]) -> Callable[[], nn.Module]:
    """Return a factory of the model that a folder's config.json names.

    Raises ModelError naming the class when no installed library has it.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ModelError(
            f"{folder}: has no {CONFIG}; pass the model and the checkpoint to blockstream.stream()"
        )
    return from_config(path)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a config.json; raises ModelError for a file of something else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no table of settings; name the config.json of a model")
    return config


def from_config(path: Path) -> Callable[[], nn.Module]:
    """Return a factory of the model that a config.json names; raises as `from_folder`."""
    config = read_config(path)
    if "_class_name" in config:
        return _diffusers(path, config)
    return _transformers(path, config)


def _diffusers(path: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    cls = _class(path, "diffusers", str(config["_class_name"]))
    settings = {k: v for k, v in config.items() if k != "auto_map"}
    return lambda: cls.from_config(settings)


def _transformers(path: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    names = config.get("architectures") or []
    if not names:
        raise ModelError(f"{path}: names no architecture; pass (class, config) to blockstream.stream()")
    cls = _class(path, "transformers", str(names[0]))

    def build() -> nn.Module:
        settings = cls.config_class.from_pretrained(path, local_files_only=True)
        module: nn.Module = cls._from_config(settings)
        return module

    return build


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
