"""One forward run on fake tensors: the order of its calls, its operations, and what it holds at most."""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from .binding import tensors_in
from .chunks import left_out, sizing
from .faking import Call, faked
from .fingerprint import fingerprint
from .kept_rehearsals import Rehearsal, find, keep, times_of
from .recorded import Written

log = logging.getLogger(__name__)

#: Kernels take work space that fake tensors do not show.
WORKSPACE_NBYTES = 8 << 20
#: What modules that fake tensors need take.
IMPORTS_NBYTES = 80 << 20
#: The C library gives back at once what is larger; of what is smaller it may keep as much again as was used.
KEPT_NBYTES = 32 << 20
#: Kernels that bring what they read and write to a layout of their own, and hold both.
_REORDERING = {torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default}


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


#: What torch's own table lacks: attention as it runs on processors.
_FLOPS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


#: What takes memory and computes nothing.
_EMPTY = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty")}


def needs_imports() -> bool:
    """Return whether a rehearsal would import `IMPORTS_NBYTES` of modules first, for a second or so.

    torch leaves its compiler out until fake tensors are used; libraries of models have it imported.
    """
    return "torch._dynamo" not in sys.modules


def rehearse(
    module: nn.Module,
    inputs: Any,
    weight_of: Callable[[str], nn.Parameter] | None = None,
    path: str = "",
    failed: Callable[[Exception], None] = lambda error: None,
    elsewhere: Callable[[Callable[[], Rehearsal | None]], Rehearsal | None] | None = None,
) -> Rehearsal | None:
    """Run a forward of the module, or of the one at `path` in it, without data.

    `inputs` are a `Call`, or what one is made `of`; only shapes and dtypes count. `weight_of` makes by path
    an empty parameter as it will be. What the same forward showed before is not found out again; `elsewhere`
    is where it is found out, this process by default. None, and `failed` is told why, if it cannot run
    without data.
    """
    part = module.get_submodule(path)
    if any(isinstance(m.__dict__.get("forward"), FunctionType) for m in part.modules()):
        log.info("%s is learnt from its first pass: a forward in it was replaced", type(part).__name__)
        return None  # what replaced it leads to the module itself, not to its copy
    prefix = f"{path}." if path else ""
    at = None if weight_of is None else lambda name: weight_of(prefix + name)
    content = fingerprint(part, Call.of(inputs), at)
    if content is not None and (kept := find(content, path)) is not None:
        return kept

    def run() -> Rehearsal | None:
        return _run(part, Call.of(inputs), at, path, failed)

    shown = run() if elsewhere is None else elsewhere(run)
    if content is not None and shown is not None:
        keep(content, path, shown)
    return shown


def _run(
    part: nn.Module,
    inputs: Call,
    weight_of: Callable[[str], nn.Parameter] | None,
    path: str,
    failed: Callable[[Exception], None],
) -> Rehearsal | None:
    calls: list[tuple[str, bool]] = []
    try:
        with faked(part, inputs, weight_of) as (fake, call):
            alive = Alive()
            alive.know(call)
            counts = _Counts(alive, calls, path)
            for name, child in fake.named_modules():
                counts.hook(child, ".".join(filter(None, (path, name))))
            with alive, sizing():
                fake(*call.args, **call.kwargs)
    except Exception as error:
        log.info("%s is learnt from its first pass (%s)", type(part).__name__, error)
        failed(error)
        return None
    peak = alive.peak_nbytes + WORKSPACE_NBYTES
    work = alive.written.work(times_of(calls))
    return Rehearsal(tuple(calls), counts.flops, peak, alive.small_peak_nbytes, work)


class _Counts:
    """Writes down calls, and counts the operations of each module's by path."""

    def __init__(self, alive: Alive, calls: list[tuple[str, bool]], root: str) -> None:
        self._alive, self._calls, self._root = alive, calls, root
        self._total: defaultdict[str, float] = defaultdict(float)
        self._times: Counter[str] = Counter()

    @property
    def flops(self) -> dict[str, float]:
        """Return the mean operations of a call of each module."""
        return {path: self._total[path] / self._times[path] for path in self._times}

    def hook(self, module: nn.Module, path: str) -> None:
        """Count the calls of one module."""
        began: list[float] = []

        def before(_: nn.Module, args: Any) -> None:
            self._calls.append((path, True))
            began.append(self._alive.flops)
            self._alive.written.enter(path)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self._calls.append((path, False))
            self._alive.written.leave()
            self._total[path] += self._alive.flops - began.pop()
            self._times[path] += 1

        module.register_forward_pre_hook(before, prepend=True)
        module.register_forward_hook(after)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations return, until they are collected, and operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: Alive now and at most, the work space of kernels included; the same of what the heap may keep.
        self.nbytes = self.peak_nbytes = 0
        self.small_nbytes = self.small_peak_nbytes = 0
        #: Floating-point operations so far, and every operation by the module that called it.
        self.flops = 0.0
        self.written = Written()
        self._known: set[int] = set()

    def know(self, inputs: Any) -> None:
        """Take what inputs hold as there before: what of it goes makes room, such as a cache replaced."""
        for _, tensor in tensors_in(inputs):
            if (key := _key(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                weakref.finalize(storage, self._collected, key, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        before = {_key(t) for t in given}
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor) and _key(t) not in before | self._known:
                self._count(t.untyped_storage())
        if func in _REORDERING:
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes + given[0].nbytes + result.nbytes)
        flops, times = 0.0, left_out()
        if (counted := _FLOPS.get(func._overloadpacket)) is not None:
            flops = counted(*args, **(kwargs or {}), out_val=result)
            self.flops += times * flops
        made = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        computes = func._schema.is_mutable or any(_key(t) not in before for t in made)
        if computes and func.overloadpacket not in _EMPTY:
            self.written.add(func, args, kwargs or {}, flops, made, times)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._add(nbytes)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self.small_peak_nbytes = max(self.small_peak_nbytes, self.small_nbytes)
        weakref.finalize(storage, self._collected, key, nbytes)

    def _add(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if abs(nbytes) <= KEPT_NBYTES:
            self.small_nbytes += nbytes

    def _collected(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._add(-nbytes)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def shapes_of(inputs: Any) -> str | None:
    """Return what the inputs look like in words that two runs agree on: "x [2, 4, 20, 32, 32]"."""
    if inputs is None:
        return None
    if isinstance(inputs, torch.Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')}{list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key} {shapes_of(value)}" for key, value in sorted(inputs.items()))
    if isinstance(inputs, tuple | list):
        return f"({', '.join(str(shapes_of(value)) for value in inputs)})"
    if isinstance(inputs, Call):
        return shapes_of(inputs.kwargs if not inputs.args else (*inputs.args, *inputs.kwargs.values()))
    return str(inputs) if isinstance(inputs, str | int | float | None) else type(inputs).__name__
