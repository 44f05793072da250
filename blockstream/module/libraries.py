"""What transformers and diffusers decide when they load a module: dtypes, and values that no file holds.

Told from the module itself; neither library is imported for a module of another.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint

from .dtypes import COMPUTED, to_torch
from .empty import empty

Library = Literal["transformers", "diffusers"]
_BASES: dict[tuple[str, str], Library] = {
    ("transformers", "PreTrainedModel"): "transformers",
    ("diffusers", "ModelMixin"): "diffusers",
}


def library_of(module: nn.Module | type) -> Library | None:
    """Return the library whose loading a module's class inherits; None for other modules."""
    cls = module if isinstance(module, type) else type(module)
    found = (_BASES.get((base.__module__.partition(".")[0], base.__name__)) for base in cls.__mro__)
    return next((library for library in found if library), None)


def dtype_for(module: nn.Module, checkpoint: Checkpoint, asked: str | None) -> str | None:
    """Return the one dtype that a module's weights are brought to; None leaves each as its file has it.

    Both libraries bring all of a module to one: where none is asked for, that of most of the files' bytes.
    """
    if asked is not None or library_of(module) is None or checkpoint.form == "packed":
        return asked
    held: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        if entry.dtype in COMPUTED:
            held[entry.dtype] += entry.nbytes
    return max(held, key=lambda name: held[name], default=None)


def stays_float32(module: nn.Module, path: str, dtype: str | None) -> bool:
    """Return whether a parameter or buffer stays in float32 where the rest is brought to `dtype`.

    diffusers names parts of paths, for any shorter dtype. transformers names patterns found anywhere in a
    path: those of `_keep_in_fp32_modules` for float16 alone. Other modules may name parts of paths alike.
    """
    if dtype not in ("F16", "BF16"):
        return False
    strict = _names(module, "_keep_in_fp32_modules_strict")
    loose = _names(module, "_keep_in_fp32_modules")
    match library_of(module):
        case "diffusers":
            return any(name in path.split(".") for name in loose)
        case "transformers":
            kept = [*strict, *(loose if dtype == "F16" else ())]
            return any(re.search(name.replace("*", ".*"), path) for name in kept)
        case _:
            kept = [*strict, *(loose if dtype == "F16" else ())]
            return any(re.search(rf"(^|\.){name}($|\.)", path) for name in kept)


def _names(module: nn.Module, attribute: str) -> list[str]:
    found = getattr(module, attribute, None) or ()
    return [found] if isinstance(found, str) else list(found)


def built_in(module: nn.Module, dtype: str | None) -> nn.Module:
    """Return the module as its library would have built it for a dtype: itself where it was built so.

    What the library decides as it builds (the dtypes of buffers, and of parameters that name their own) is
    that of the module returned, whose parameters are on meta.
    """
    library = library_of(module)
    if library is None or dtype is None or not hasattr(module, "config"):
        return module
    wanted = to_torch(dtype)
    floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
    buffers = any(b.is_floating_point() for b in module.buffers())
    declared = getattr(module.config, "dtype", None) if library == "transformers" else None
    if declared is wanted or floats == {wanted} or (len(floats) == 1 and not buffers):
        return module
    try:
        with empty():
            return build_in(type(module), module.config, wanted)
    except Exception:  # a module that its own config does not build: as the user made it
        return module


def build_in(cls: Any, config: Any, dtype: torch.dtype | None) -> nn.Module:
    """Return a module of a library's class from its config, built in a dtype as the library builds it."""
    if library_of(cls) == "transformers":
        options = {} if dtype is None else {"dtype": dtype}
        module: nn.Module = cls._from_config(copy.deepcopy(config), **options)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _compute_buffers(module, module)
        return module
    with _default(dtype):
        made: nn.Module = cls.from_config(config)
        return made


def _compute_buffers(module: nn.Module, model: Any) -> None:
    """Compute the buffers that no file holds as transformers does, once all are built: in the usual dtype."""
    if hasattr(module, "_init_weights"):
        model = module
    for child in module.children():
        _compute_buffers(child, model)
    if module._non_persistent_buffers_set:
        model._init_weights(module)


@contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def computed(module: nn.Module, path: str) -> Tensor | None:
    """Return the value of a parameter that its library computes and no file holds; None if it must be held.

    Only what the module says may be missing, and what comes out the same however random numbers fall.
    """
    patterns = _names(module, "_keys_to_ignore_on_load_missing")
    initialise = getattr(module, "_init_weights", None)
    if library_of(module) != "transformers" or initialise is None:
        return None
    if not any(re.search(pattern, path) for pattern in patterns):
        return None
    prefix, _, name = path.rpartition(".")
    values = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            owner = copy.deepcopy(module.get_submodule(prefix)).to_empty(device="cpu")
            owner._parameters[name].fill_(float("nan"))  # type: ignore[union-attr]
            initialise(owner)
            values.append(owner._parameters[name])
    first, second = values
    assert first is not None and second is not None
    same = torch.equal(first, second) and not first.isnan().any()
    return first.detach() if same else None
