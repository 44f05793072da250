"""Low-rank adapters of a file, put beside the layers of a module that streams or is in memory.

Keys are those of peft (`base_model.model.PATH.lora_A.weight`), of diffusers
(`transformer.PATH.lora_A.weight`), or with `lora_down`, `lora_up` and `alpha`. peft computes, unmerged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.index import read_json
from blockstream.errors import CheckpointError, ConfigError, ModelError
from blockstream.run.identity import identity_of

from .adapters import base_of
from .weights import read_entry

_KEY = re.compile(r"(?P<path>.+?)\.(?:lora_?(?P<side>A|B|down|up)|lora\.(?P<old>down|up))(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(?P<path>.+?)(?:\.lora)?\.alpha")
#: What stands before the paths of a module's layers.
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "unet.", "model.", "")
_CONFIG = "adapter_config.json"


def load_lora(module: nn.Module, path: Path, name: str, scale: float = 1.0) -> None:
    """Put the adapters of a file, or of the folder of one, beside a module's layers and make them active.

    `name` tells them from others of the module, which stay active; `scale` multiplies what they add. Raises
    ConfigError naming the file and the key that no layer fits, that is missing, or is of another shape.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    root = base_of(module)
    file, settings = _found(path)
    held = Checkpoint.open(file)
    pairs, alphas = _pairs(file, held, root)
    ranks = {layer: sides["A"].shape[0] for layer, sides in pairs.items()}
    default = settings.get("lora_alpha")
    scales = {
        layer: float(alphas.get(layer, _of_pattern(settings, layer, default or rank)))
        for layer, rank in ranks.items()
    }
    config = LoraConfig(
        target_modules=sorted(pairs),
        rank_pattern={f"^{re.escape(layer)}$": rank for layer, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(layer)}$": alpha for layer, alpha in scales.items()},
        use_rslora=bool(settings.get("use_rslora")),
        init_lora_weights=False,
    )
    active = _active(root, LoraLayer)
    try:
        inject_adapter_in_model(config, root, name)
    except ValueError as error:
        raise ConfigError(f"lora: {file}: peft cannot adapt {type(root).__name__}: {error}") from error
    for layer, sides in pairs.items():
        made: Any = root.get_submodule(layer)
        for side, value in sides.items():
            weight = getattr(made, f"lora_{side}")[name].weight
            if weight.shape != value.shape:
                raise ConfigError(
                    f"lora: {file}: lora_{side} of {layer!r} has shape {list(value.shape)} and needs "
                    f"{list(weight.shape)}; is it of another model?"
                )
            with torch.no_grad():
                weight.copy_(value)
    for part in root.modules():
        if isinstance(part, LoraLayer):
            if name in part.scaling:
                part.set_scale(name, scale)
            part.set_adapter([one for one in (*active, name) if one in part.scaling])
            part.requires_grad_(False)


def _active(root: nn.Module, kind: type) -> list[str]:
    """Return the adapters that are active, in the order in which a layer adds them up."""
    layers: Iterator[Any] = (part for part in root.modules() if isinstance(part, kind))
    return list(dict.fromkeys(one for part in layers for one in part.active_adapters))


def _found(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a path, and peft's settings that lie beside it."""
    if not path.exists():
        raise ConfigError(f"lora: {path}: there is no such file or folder; check the path")
    file = path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ConfigError(
                f"lora: {path}: holds {len(files)} safetensors files; name the one to load"
                f"{': ' * bool(files)}{', '.join(f.name for f in files[:4])}"
            )
        file = files[0]
    beside = file.parent / _CONFIG
    settings = read_json(beside) if beside.is_file() else {}
    if not isinstance(settings, dict):
        raise ConfigError(f"lora: {beside}: holds no table of settings; fetch it again")
    kind = settings.get("peft_type", "LORA")
    for key, wanted in (
        ("peft_type", "LORA"),
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
    ):
        value = kind if key == "peft_type" else settings.get(key, wanted)
        if value not in (wanted, None, []):
            raise ConfigError(
                f"lora: {beside}: has {key} {value!r}, which is not read; load it from Python by peft's own "
                "calls inside `with blockstream.stream(...)`"
            )
    return file, settings


def _of_pattern(settings: Mapping[str, Any], layer: str, default: float) -> float:
    """Return the alpha that peft's settings give a layer."""
    patterns = settings.get("alpha_pattern") or {}
    return next((v for key, v in patterns.items() if re.search(rf"(^|\.){key}$", layer)), default)


def _pairs(
    file: Path, held: Checkpoint, root: nn.Module
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Return both sides of each layer's adapter, and the alphas that the file holds."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [name for name, _ in root.named_modules()]
    adapted = [name for name, part in root.named_modules() if isinstance(part, BaseTunerLayer)]
    # What an earlier adapter put there is no layer of the module.
    layers = {n for n in names if not any(n.startswith(f"{a}.") for a in adapted)}
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key in held.names:
        found, alpha = _KEY.fullmatch(key), _ALPHA.fullmatch(key)
        if found is None and alpha is None:
            raise ConfigError(
                f"lora: {file}: {key!r} is no key of a low-rank adapter (PATH.lora_A.weight, "
                "PATH.lora_B.weight, PATH.alpha); what else there is of adapters is loaded from Python, by "
                "peft's own calls"
            )
        match = found or alpha
        assert match is not None
        layer = _layer(file, key, match["path"], layers, root)
        try:
            value = read_entry(held[key])
        except CheckpointError as error:
            raise ConfigError(f"lora: {error}") from error
        if found is None:
            alphas[layer] = float(value)
        else:
            side = found["side"] or found["old"]
            pairs.setdefault(layer, {})[{"down": "A", "up": "B"}.get(side, side)] = value
    for layer, sides in pairs.items():
        if missing := {"A", "B"} - sides.keys():
            raise ConfigError(
                f"lora: {file}: has no lora_{missing.pop()} of {layer!r} beside the other; fetch it again"
            )
    if not pairs:
        raise ConfigError(f"lora: {file}: holds no adapters")
    return pairs, alphas


def _layer(file: Path, key: str, path: str, layers: set[str], root: nn.Module) -> str:
    """Return the layer of a module that a key is of."""
    for prefix in _PREFIXES:
        if path.startswith(prefix) and path.removeprefix(prefix) in layers:
            return path.removeprefix(prefix)
    near = get_close_matches(path, sorted(layers), 1, 0.5)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ConfigError(
        f"lora: {file}: {key!r} is of no layer of {type(root).__name__}{hint}; is it of another model?"
    )


def load_loras(module: nn.Module, loras: Sequence[tuple[Path, float]]) -> None:
    """Put the adapters of several files beside a module's layers, each with its scale; see `load_lora`."""
    for n, (path, scale) in enumerate(loras):
        try:
            load_lora(module, path, f"lora{n}", scale)
        except ModelError as error:
            raise ConfigError(f"lora: {path}: {error}") from error


def identities(paths: Sequence[Path]) -> dict[str, str]:
    """Return what tells the adapters at some paths from others, by number and name."""
    found = {}
    for n, path in enumerate(paths):
        file, settings = _found(path)
        found[f"lora{n} {path.name}"] = identity_of(
            Checkpoint.open(file), json.dumps(settings, sort_keys=True)
        )
    return found
