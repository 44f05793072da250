"""Find the order a pass runs its blocks in, without running anything.

A deep copy of the module is made on fake tensors, which have shapes and no data, and its forward is
run. The user's module, hooks, caches and tables are not touched, and nothing is computed.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from .standins import Absent

if TYPE_CHECKING:
    from .prepared import Prepared

log = logging.getLogger(__name__)

_LruCache = type(functools.lru_cache(lambda: None))


#: The beginning (True) and end of each call of a module in a forward, by its first path, in turn.
Calls = Sequence[tuple[str, bool]]


def find_order(prepared: Prepared, example_inputs: Any) -> list[int] | None:
    """Return the order of one pass as indices of parts: declared, else from example inputs, else None.

    The forward is run once, however often the module is cut anew.
    """
    index = {part.entry: i for i, part in enumerate(prepared.parts) if part.entry is not None}
    if prepared.declared:
        return [index[path] for path in prepared.declared if path in index] or None
    if example_inputs is None:
        return None
    if prepared.calls is None:
        prepared.calls = fake_calls(prepared.module, example_inputs, prepared.dtype_of)
    ran = _order_of(prepared.calls, prepared.module, list(index))
    return [list(index.values())[k] for k in ran] if ran else None


def fake_order(
    module: nn.Module,
    entries: Sequence[str],
    example_inputs: Any,
    dtype_of: Callable[[str], torch.dtype] | None = None,
) -> list[int] | None:
    """Return the indices of `entries` (module paths) in the order one forward calls them.

    `example_inputs`: a mapping of keyword arguments, a sequence of positional ones, or the one
    argument. Only shapes and dtypes count. None if the forward cannot run without data, or calls one entry
    inside another.
    """
    return _order_of(fake_calls(module, example_inputs, dtype_of), module, entries)


def fake_calls(
    module: nn.Module, example_inputs: Any, dtype_of: Callable[[str], torch.dtype] | None = None
) -> Calls:
    """Return the calls of one forward; none if it cannot run without data."""
    calls: list[tuple[str, bool]] = []
    try:
        with faked(module, example_inputs, dtype_of) as (fake, args, kwargs):
            _record(fake, calls)
            fake(*args, **kwargs)
    except Exception as error:
        log.info("the order of %s is learnt in the first pass (%s)", type(module).__name__, error)
        return ()
    return calls


def _order_of(calls: Calls, module: nn.Module, entries: Sequence[str]) -> list[int] | None:
    """Return the indices of the entries in the order they are called, None if one is inside another."""
    modules = dict(module.named_modules(remove_duplicate=False))
    first = {id(m): path for path, m in module.named_modules()}
    index = {first[id(modules[path])]: i for i, path in enumerate(entries)}
    ran: list[int] = []
    computing: str | None = None
    for path, begins in calls:
        if path not in index:
            continue
        if begins and computing is not None:
            log.info("%s is called while %s computes: the order is learnt in the first pass", path, computing)
            return None
        computing = path if begins else None
        if begins:
            ran.append(index[path])
    return ran if calls else None


@contextmanager
def faked(
    module: nn.Module, example_inputs: Any, dtype_of: Callable[[str], torch.dtype] | None = None
) -> Iterator[tuple[nn.Module, Sequence[Any], Mapping[str, Any]]]:
    """Yield a copy of the module on fake tensors, and positional and keyword arguments for it.

    Nothing outside is touched: caches that may hold fake tensors are cleared, the random state is kept.
    """
    state = torch.random.get_rng_state()
    try:
        with _cleared_caches(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            with FakeCopyMode(mode):
                fake, inputs = copy.deepcopy((module, example_inputs), _stand_ins(module))
            _make_computable(fake, dtype_of)
            yield fake, *split_inputs(inputs)
    finally:
        torch.random.set_rng_state(state)


def _stand_ins(module: nn.Module) -> dict[int, Any]:
    """Return what to copy in the place of weights that are on disk: empty ones on meta."""
    absent = (p for p in module.parameters() if isinstance(p, Absent))
    return {id(p): nn.Parameter(p.to_meta(), requires_grad=False) for p in absent}


def split_inputs(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return example inputs as (positional, keyword) arguments."""
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return inputs, {}
    return (inputs,), {}


def _make_computable(fake: nn.Module, dtype_of: Callable[[str], torch.dtype] | None) -> None:
    """Put every parameter on a fake CPU in the dtype it will have; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in fake.named_modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                path = f"{prefix}.{name}" if prefix else name
                dtype = dtype_of(path) if dtype_of is not None else param.dtype
                data = torch.empty(tuple(param.shape), dtype=dtype, device="cpu")
                made[id(param)] = nn.Parameter(data, requires_grad=False)
            module._parameters[name] = made[id(param)]


def _record(fake: nn.Module, calls: list[tuple[str, bool]]) -> None:
    def begin(path: str) -> Callable[..., None]:
        return lambda module, args: calls.append((path, True))

    def end(path: str) -> Callable[..., None]:
        return lambda module, args, output: calls.append((path, False))

    for path, module in fake.named_modules():
        module.register_forward_pre_hook(begin(path), prepend=True)
        module.register_forward_hook(end(path))


@contextmanager
def _cleared_caches() -> Iterator[None]:
    """Clear the `lru_cache`s that grew in the block: they may hold fake tensors now."""
    before = {id(c): c.cache_info().currsize for c in _caches()}
    try:
        yield
    finally:
        for cache in _caches():
            if cache.cache_info().currsize != before.get(id(cache), 0):
                cache.cache_clear()


def _caches() -> list[Any]:
    return [o for o in gc.get_objects() if type(o) is _LruCache]
