"""Whether a config goes on with a run: what it was begun with counts, what changes no bit may differ."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError

from . import yamlfile
from .config import RunConfig
from .journal import NAME, Journal

#: Keys of the engine that never change a bit of the result. An option of a pipeline that does not either
#: says so: `Field(..., json_schema_extra={"numerics": False})`.
FREE = frozenset(
    {"plugins", "observers", "budget", "device_budget", "arena", "policy", "output", "allow_nonfinite"}
)
#: Numerics that a run writes out as what their `auto` meant when it began.
PINNED = ("device", "threads", "int8")


def config_of(folder: Path) -> str | yamlfile.Document:
    """Return the path of a run's config.yaml; the config in the run's record where a kill came before it.

    Raises ConfigError for what is the folder of no run.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; --resume goes on with the run in a folder")
    path = folder / "config.yaml"
    if path.exists() or path.is_symlink():
        return str(path)
    journal = Journal.read(folder)
    if not journal.begun:
        raise no_run(folder)
    return yamlfile.Document(str(journal.path), dict(journal.config))


def no_run(folder: Path) -> ConfigError:
    """Return the error for a folder that no run was begun in."""
    return ConfigError(
        f"{folder} holds no record of a run ({NAME}): none was begun there; begin one with --out {folder}"
    )


def resumed(config: RunConfig, was: Mapping[str, Any], folder: Path) -> RunConfig:
    """Return a config with its numerics pinned to what the run in a folder was begun with.

    Raises ConfigError naming every key that differs and may not.
    """
    pinned = {key: was[key] for key in PINNED if getattr(config, key) == "auto" and key in was}
    config = config.model_copy(update=pinned)
    now = yamlfile.parse(config.dump(), config.source).data
    free = FREE | _free_options(config)
    changed = [
        f"{key} was {reprlib.repr(was[key])} and is {reprlib.repr(value)}"
        for key, value in now.items()
        if key in was and key not in free and was[key] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} was begun with another config: {'; '.join(changed)}. Its rest would not belong to its "
            f"beginning: resume it with those values, in {folder / 'config.yaml'} too, or start another run "
            "with --out"
        )
    return config


def _free_options(config: RunConfig) -> set[str]:
    options = config.pipeline.options
    fields = {} if options is None else type(options).model_fields
    extra = {name: field.json_schema_extra for name, field in fields.items()}
    return {name for name, more in extra.items() if isinstance(more, dict) and more.get("numerics") is False}
