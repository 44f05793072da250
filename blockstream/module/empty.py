"""Build modules without their weights: parameters on meta, buffers real.

Buffers stay real because many are computed once and never stored (rotary frequencies, masks); on
meta they would silently be garbage.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from blockstream.errors import ModelError

#: `torch.empty` makes tensors from this size on on meta in an `empty()` block.
LARGE_NBYTES = 64 << 20


#: What initialises weights, in vain on meta, where it is half the time that building a large model takes.
_FILLS = {"constant_", "fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "zero_"}


class _Building(threading.local):
    """How many `empty()` blocks the thread is in."""

    depth = 0


_building = _Building()
_patch_lock = threading.Lock()
_patches: list[None] = []
_register_parameter = nn.Module.register_parameter


class _OnMeta(TorchFunctionMode):
    """Makes large uninitialised tensors on meta at once, as some systems refuse to reserve them.

    Those on meta are not filled: libraries put functions of their own in the place of `nn.init`'s, under
    the same names.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        if func is torch.empty and "out" not in kwargs and str(kwargs.get("device") or "cpu") == "cpu":
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.nbytes >= LARGE_NBYTES:
                return made
        return func(*args, **kwargs)


def _register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if param is not None and _building.depth and not param.is_meta:
        fields = {k: v for k, v in vars(param).items() if not k.startswith("__")}
        meta = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
        meta.__dict__.update(fields)
        param = meta
    _register_parameter(self, name, param)


@contextmanager
def empty() -> Iterator[None]:
    """Put the parameters of modules built in the block on meta, and leave their buffers real.

    Applies to the thread that enters it. One parameter at a time exists for a moment, and is never
    initialised: its `torch.empty` is not touched, and a large one is on meta from the start.
    """
    with _patch_lock:
        _patches.append(None)
        nn.Module.register_parameter = _register_on_meta  # type: ignore[method-assign]
    _building.depth += 1
    try:
        with _OnMeta():
            yield
    finally:
        _building.depth -= 1
        with _patch_lock:
            _patches.pop()
            if not _patches:
                nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]


def build(model: Any) -> nn.Module:
    """Return the module that a user named: a module, a factory, or a class with its config.

    Factories and `(class, config)` are built under `empty()` and set to eval. A module's buffers
    that are on meta and in no checkpoint are rebuilt from its config, or refused by name.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is scripted, and its calls cannot be followed; pass the module it is of")
    if isinstance(model, nn.Module):
        module = model
    else:
        with empty():
            module = _made(model)
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"the model's factory returned {type(module).__name__}, expected a torch.nn.Module"
            )
        module.eval()
    _rebuild_buffers(module)
    return module


def _made(model: Any) -> Any:
    """Return what a factory, or a class and its config, make."""
    if isinstance(model, tuple) and len(model) == 2 and callable(model[0]):
        return _from_class(*model)
    if not callable(model):
        raise ModelError(
            f"{type(model).__name__} is no model: pass a module, a factory of one, or (class, config)"
        )
    return model()


def _from_class(cls: Any, config: Any) -> nn.Module:
    """Build a class from its config, the way its library does."""
    for name in ("_from_config", "from_config"):  # transformers, diffusers
        factory = getattr(cls, name, None)
        if factory is not None:
            module: nn.Module = factory(config)
            return module
    made: nn.Module = cls(**config) if isinstance(config, Mapping) else cls(config)
    return made


def _rebuild_buffers(module: nn.Module) -> None:
    """Replace non-persistent buffers that are on meta by those of a fresh module of the same config."""
    missing = list(meta_buffers(module))
    if not missing:
        return
    config = getattr(module, "config", None)
    fresh = None
    if config is not None:
        with empty():
            fresh = _from_class(type(module), config)
    made = dict(fresh.named_buffers(remove_duplicate=False)) if fresh is not None else {}
    for path, owner, name in missing:
        buffer = made.get(path)
        if buffer is None or buffer.is_meta:
            raise ModelError(
                f"buffer {path!r} of {type(module).__name__} is on meta and no checkpoint holds it, so its "
                "values are lost; build the module under blockstream.empty() (not torch.device('meta')), "
                "or pass a factory"
            )
        owner._buffers[name] = buffer


def meta_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (path, owner, name) of the buffers on meta that a state dict does not hold."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta and name in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, owner, name
