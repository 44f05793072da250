"""What a forward holds besides weights, found on fake tensors: nothing is read, computed or allocated."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .chunks import sizing
from .order import faked
from .prepared import Prepared

log = logging.getLogger(__name__)

#: Kernels take work space that fake tensors do not show.
WORKSPACE_NBYTES = 8 << 20
#: The C library gives back at once what is larger; of what is smaller it may keep as much again as was used.
KEPT_NBYTES = 32 << 20
#: Kernels that bring what they read and write to a layout of their own, and hold both.
_REORDERING = {torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default}


def activation_nbytes(prepared: Prepared, example_inputs: Any) -> int | None:
    """Return the most bytes of results alive at once in a forward, with room for what kernels and heap take.

    None without example inputs, or if the forward cannot run without data.
    """
    if example_inputs is None:
        return None
    try:
        with faked(prepared.module, example_inputs, prepared.dtype_of) as (fake, args, kwargs):
            alive = Alive()
            with alive, sizing():
                fake(*args, **kwargs)
    except Exception as error:
        log.info("what %s needs is measured in the first pass (%s)", type(prepared.module).__name__, error)
        return None
    return alive.peak_nbytes + alive.small_peak_nbytes + WORKSPACE_NBYTES


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations return, until they are collected."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: Alive now and at most, the work space of kernels included; the same of what the heap may keep.
        self.nbytes = self.peak_nbytes = 0
        self.small_nbytes = self.small_peak_nbytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        before = {_key(t) for t in given}
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor) and _key(t) not in before | self._known:
                self._count(t.untyped_storage())
        if func in _REORDERING:
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes + given[0].nbytes + result.nbytes)
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
