"""What a folder's config.json says about how its weights are quantised. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockstream.errors import CheckpointError

from .index import read_json

CONFIG = "config.json"


def quantisation(root: Path) -> dict[str, Any] | None:
    """Return `quantization_config` of the config.json beside a checkpoint; None where there is none."""
    path = (root if root.is_dir() else root.parent) / CONFIG
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except CheckpointError:
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def refuse_quantised(root: Path, settings: dict[str, Any], held_plain: bool = False) -> CheckpointError:
    """Return the error for a checkpoint quantised in a way that is not read, or not at all (`held_plain`)."""
    method = settings.get("quant_method", "?")
    if held_plain:
        return CheckpointError(
            f"{root}: its config.json has quantization_config.quant_method {method!r}, and it holds no "
            "weights so quantised; take quantization_config out of config.json to stream them as they are"
        )
    return CheckpointError(
        f"{root}: its config.json has quantization_config.quant_method {method!r}, and weights so quantised "
        "are not read; name the original checkpoint (`blockstream pack --dtype int8` makes that smaller), or "
        "write it dequantised with the library that quantised it"
    )
