"""Go on with the run in a folder: what it was begun with counts, and nothing that is finished is redone."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError
from blockstream.system import regular

from . import yamlfile
from .config import RunConfig

#: Keys of the engine that never change a bit of the result. An option of a pipeline that does not either
#: says so: `Field(..., json_schema_extra={"numerics": False})`.
FREE = frozenset({"plugins", "budget", "arena", "policy", "output"})
#: Numerics that a run writes out as what their `auto` meant when it began.
PINNED = ("threads", "int8")


def resumed(config: RunConfig, folder: Path) -> RunConfig:
    """Return a config with its numerics pinned to those in the folder's config.yaml.

    Raises ConfigError naming every key that differs and may not, or when there is no run to go on with.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{path} does not exist: no run was begun there; begin one with --out {folder}")
    was = yamlfile.read(path).data
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
            "beginning: resume it without a config, or start another run with --out"
        )
    return config


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the report of a run whose files are all there, None while something is left to do."""
    try:
        report = json.loads(regular.read_text(folder / "report.json"))
        files = report["output"]["files"]
        done = bool(files) and all((folder / name).is_file() for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(report) if done else None


def keep_ledger(folder: Path) -> None:
    """Set the ledger of the run so far aside, as ledger.1.jsonl, ledger.2.jsonl, ..."""
    ledger = folder / "ledger.jsonl"
    if ledger.is_file():
        n = 1
        while (kept := folder / f"ledger.{n}.jsonl").exists():
            n += 1
        ledger.rename(kept)


def _free_options(config: RunConfig) -> set[str]:
    options = config.pipeline.options
    fields = {} if options is None else type(options).model_fields
    extra = {name: field.json_schema_extra for name, field in fields.items()}
    return {name for name, more in extra.items() if isinstance(more, dict) and more.get("numerics") is False}
