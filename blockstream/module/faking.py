"""A copy of a module on fake tensors, which have shapes and no data: nothing is read or computed.

The user's module, hooks, caches, tables and random state are not touched.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map_only

from .guards import left_out, strip
from .narrow import Narrow
from .standins import Absent

#: Values of a class that a forward may replace: counters, flags, a tensor of the step before.
_KEPT = (int, float, str, tuple, torch.Tensor, type(None))
_LruCache = type(functools.lru_cache(lambda: None))


@dataclass(frozen=True)
class Call:
    """The arguments of one forward; `args` are the positional ones."""

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> Call:
        """Return example inputs as a call.

        They are a mapping of keyword arguments, a sequence of positional ones, or the one argument.
        """
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping):
            return cls(kwargs=inputs)
        return cls(tuple(inputs)) if isinstance(inputs, tuple | list) else cls((inputs,))


@contextmanager
def faked(
    module: nn.Module, call: Call, weight_of: Callable[[str], nn.Parameter] | None = None
) -> Iterator[tuple[nn.Module, Call]]:
    """Yield a copy of the module on fake tensors, and a call for it.

    Caches that may hold fake tensors afterwards are cleared; whatever the copy raises passes through.
    """
    state = torch.random.get_rng_state()
    try:
        with (
            _cleared_caches(),
            _kept_classes(module),
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
            torch.inference_mode(False),  # in which operations are seen whole, and not counted
            torch.no_grad(),
        ):
            with FakeCopyMode(mode):
                fake, args, kwargs = copy.deepcopy(
                    (module, call.args, call.kwargs), {**left_out(module), **_stand_ins(module)}
                )
            strip(fake)
            _make_computable(fake, weight_of)
            args, kwargs = tree_map_only(torch.Tensor, _on_processor, (args, kwargs))
            yield fake, Call(args, kwargs)
    finally:
        torch.random.set_rng_state(state)


def _stand_ins(module: nn.Module) -> dict[int, Any]:
    """Return what to copy in the place of weights that are on disk: empty ones on meta."""
    absent = (p for p in module.parameters() if isinstance(p, Absent | Narrow))
    return {id(p): _on_meta(p) for p in absent}


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(tuple(param.shape), dtype=param.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=param.requires_grad)


def _make_computable(fake: nn.Module, weight_of: Callable[[str], nn.Parameter] | None) -> None:
    """Put every parameter on a fake CPU as `weight_of` its path says it will be; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in fake.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                path = f"{prefix}.{name}" if prefix else name
                data = torch.empty(tuple(param.shape), dtype=param.dtype, device="cpu")
                own = nn.Parameter(data, requires_grad=param.requires_grad)
                made[id(param)] = own if weight_of is None else weight_of(path)
            module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _on_processor(buffer)


def _on_processor(tensor: Tensor) -> Tensor:
    """Return a fake tensor, one on the processor for one on a device."""
    if tensor.device.type in ("cpu", "meta"):
        return tensor
    return torch.empty_like(tensor, device="cpu")


@contextmanager
def _kept_classes(module: nn.Module) -> Iterator[None]:
    """Put back what a forward counts or keeps in the attributes of the modules' classes."""
    classes = {c for m in module.modules() for c in type(m).__mro__}
    own = [c for c in classes if c.__module__.partition(".")[0] not in ("torch", "builtins")]
    kept = [(c, name, x) for c in own for name, x in vars(c).items() if isinstance(x, _KEPT)]
    try:
        yield
    finally:
        for c, name, value in kept:
            if c.__dict__.get(name) is not value:
                setattr(c, name, value)


class _Caches:
    """The `lru_cache`s there are, looked for anew where modules have been imported since the last time."""

    def __init__(self) -> None:
        self._modules = 0
        self._found: list[weakref.ref[Any]] = []

    def __iter__(self) -> Iterator[Any]:
        if self._modules != len(sys.modules):
            self._modules = len(sys.modules)
            self._found = [weakref.ref(o) for o in gc.get_objects() if type(o) is _LruCache]
        return (cache for ref in self._found if (cache := ref()) is not None)


_caches = _Caches()


@contextmanager
def _cleared_caches() -> Iterator[None]:
    """Clear the `lru_cache`s that grew in the block: they may hold fake tensors now."""
    before = {id(c): c.cache_info().currsize for c in _caches}
    try:
        yield
    finally:
        for cache in _caches:
            if cache.cache_info().currsize != before.get(id(cache), 0):
                cache.cache_clear()
