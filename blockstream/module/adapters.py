"""Adapters beside streamed weights (LoRA and its like, by peft): told from their modules, peft not imported.

An adapter's parameters stay in memory as they are, and the layer that it wraps streams. Libraries put
adapters into a model before it streams or while it does; what they ask of it then (names, shapes, values of
their own parameters) they are given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import nn

from blockstream.errors import ModelError

#: What peft calls the layer that an adapter wraps.
BASE = re.compile(r"(?<![^.])base_layer\.")
#: Whose calls of `state_dict` ask for names and shapes alone.
_ASKING = ("peft", "diffusers.loaders", "transformers.core_model_loading", "transformers.integrations.peft")


def base_of(module: nn.Module) -> nn.Module:
    """Return the model inside peft's wrapper of it; any other module as it is."""
    names = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(module).__mro__}
    if "peft.PeftModel" not in names:
        return module
    base: nn.Module = module.get_base_model()  # type: ignore[operator]
    return base


def adapter_paths(root: nn.Module) -> set[str]:
    """Return the paths of the parameters that adapters have put into a module."""
    found = set()
    for prefix, module in root.named_modules(remove_duplicate=False):
        if any(
            c.__module__.startswith("peft.") and c.__name__ == "BaseTunerLayer" for c in type(module).__mro__
        ):
            inside = (name for name, _ in module.named_parameters(remove_duplicate=False))
            found |= {
                f"{prefix}.{name}" if prefix else name
                for name in inside
                if not name.startswith("base_layer.")
            }
    return found


def refuse_empty(root: nn.Module, paths: Iterable[str]) -> None:
    """Raise ModelError for an adapter whose values are nowhere."""
    for path in paths:
        if root.get_parameter(path).is_meta:
            raise ModelError(
                f"parameter {path!r} of an adapter is on meta, where peft puts it beside a model on meta, so "
                "its values are lost; load the adapter once the model is streamed, inside the with block"
            )


def asks_names() -> bool:
    """Return whether a library that loads adapters asks a module, through torch's own code, for its state."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("torch."):
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return any(name == asking or name.startswith(asking + ".") for asking in _ASKING)


def writes_adapters_alone(root: nn.Module, state: Any) -> bool:
    """Return whether a state dict holds values of adapters' parameters and nothing else."""
    return isinstance(state, Mapping) and bool(state) and set(state) <= adapter_paths(root)
