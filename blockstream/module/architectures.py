"""Which module a name, a config.json or a checkpoint's folder stands for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from blockstream.errors import ConfigError, ModelError, PluginError
from blockstream.plugins.choices import ModelFamily
from blockstream.plugins.manager import Plugins

from .empty import empty
from .pretrained import CONFIG, from_config, read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """A module to be built without weights, its config.json, and what else its folder has."""

    name: str
    build: Callable[[], nn.Module]
    config: Mapping[str, Any] | None = None
    write_extras: Callable[[Path], None] | None = None

    def module(self) -> nn.Module:
        """Return the module, parameters on meta, in eval mode."""
        with empty():
            return self.build().eval()


def find(ref: str, plugins: Plugins | None = None) -> Architecture:
    """Return the architecture of a family's name, a config.json, or a folder that has one.

    Raises ConfigError naming the nearest family, ModelError for a config nobody knows.
    """
    plugins = plugins or Plugins()
    path = Path(ref)
    if path.exists() and not path.is_dir():
        return _of_config(path, plugins)
    if (path / CONFIG).exists():
        return _of_config(path / CONFIG, plugins)
    try:
        family = plugins.family(ref)
    except ConfigError as error:
        there = f"{path} is a folder without a {CONFIG}, and " if path.is_dir() else ""
        raise ConfigError(f"{there}{error}; or name a config.json, or a folder that has one") from error
    return Architecture(family.name, family.module, family.config, family.write_extras)


def of_folder(folder: Path, plugins: Plugins | None = None) -> Architecture:
    """Return the architecture of a checkpoint's folder: a plugin's family, else transformers or diffusers.

    Raises ModelError when its config.json is missing, or one that nobody knows.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ModelError(f"{folder} has no {CONFIG}; name its architecture with --model")
    return _of_config(path, plugins or Plugins())


def _of_config(path: Path, plugins: Plugins) -> Architecture:
    config = read_config(path)
    name = str(config.get("_class_name") or config.get("model_type") or path.parent.name)
    for families in plugins.all_families():
        for family in families.values():
            if family.from_config is not None and _knows(family, config):
                build = partial(_built, family.from_config, config)
                return Architecture(name, build, config, family.write_extras)
    return Architecture(name, from_config(path), config)


def _knows(family: ModelFamily, config: Mapping[str, Any]) -> bool:
    """Return whether a config is a family's; one that fails at the question knows none, which is said."""
    assert family.from_config is not None
    try:
        with empty():
            return family.from_config(config) is not None
    except PluginError as error:
        log.warning("%s; it is passed over", error)
        return False


def _built(build: Callable[[Mapping[str, Any]], nn.Module | None], config: Mapping[str, Any]) -> nn.Module:
    module = build(config)
    assert module is not None, "a family that knew a config knows it still"
    return module
