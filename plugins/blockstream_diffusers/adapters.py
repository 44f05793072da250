"""Low-rank adapters beside a pipeline's networks: loaded by diffusers, and held to what their files say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockstream.errors import ConfigError, ModelError

from .options import Lora


def load_lora(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load the adapters of some files into a pipeline, each with its scale.

    Raises ConfigError naming a file that is not there, whose keys the networks have no place for, or whose
    tensors are not of the layers' shapes.
    """
    if not loras:
        return
    who = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"lora: {who} takes no adapters; leave lora out")
    import peft  # noqa: F401  (its absence is said before diffusers says it in its own way)

    for n, lora in enumerate(loras):
        _load(pipe, lora.path, f"lora{n}")
    pipe.set_adapters([f"lora{n}" for n in range(len(loras))], [lora.scale for lora in loras])


def _load(pipe: Any, path: Path, name: str) -> None:
    if not path.exists():
        raise ConfigError(f"lora: {path}: there is no such file or folder; check the path")
    file = path if path.is_file() else _in_folder(path)
    try:
        found = pipe.lora_state_dict(str(file.parent), weight_name=file.name, local_files_only=True)
        held = found[0] if isinstance(found, tuple) else found
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True
        )
    except ModelError as error:
        raise ConfigError(
            f"lora: {file}: has tensors for layers that {type(pipe).__name__} lacks; is it another model's?"
        ) from error
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        first = " ".join(str(error).split())[:400]
        raise ConfigError(f"lora: {file}: {type(pipe).__name__} cannot load it: {first}") from error
    wanted = sum(not key.endswith("alpha") for key in held)
    loaded = [key for part in _networks(pipe) for key in _adapter_keys(part, name)]
    if not loaded or len(loaded) != wanted:
        raise ConfigError(
            f"lora: {file}: of its {wanted} tensors ({next(iter(held), 'none')} is the first) {len(loaded)} "
            f"have a place in {type(pipe).__name__}; is it of another model?"
        )


def _in_folder(path: Path) -> Path:
    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ConfigError(
            f"lora: {path}: holds {len(found)} safetensors files ({', '.join(f.name for f in found[:4])}); "
            "name the one to load"
        )
    return found[0]


def _networks(pipe: Any) -> list[Any]:
    return [part for part in pipe.components.values() if getattr(part, "peft_config", None)]


def _adapter_keys(module: Any, name: str) -> list[str]:
    """Return the parameters of one adapter in a module."""
    mark = f".{name}."
    return [key for key, _ in module.named_parameters() if "lora_" in key and mark in f"{key}."]
