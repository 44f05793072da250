"""Stand-ins for parameters whose weights are not in memory.

A meta tensor in a kernel can silently give garbage (`F.linear` of a real input and a meta weight
does). A stand-in answers questions about shape, dtype and device, and refuses everything else by
name. The one of an embedding's table gathers rows from the file instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError

_T: Any = torch.Tensor
_PROPERTIES = (
    "shape dtype layout requires_grad ndim is_leaf grad grad_fn is_meta is_quantized is_sparse is_nested "
    "itemsize nbytes is_cuda is_cpu is_mps is_xpu retains_grad"
)
_METHODS = (
    "size dim numel nelement stride element_size is_floating_point is_complex is_signed is_contiguous "
    "ndimension __len__ __hash__ is_inference is_conj is_neg get_device"
)
#: What may be asked of a parameter without its values.
_ANSWERED: frozenset[Any] = frozenset(
    [getattr(_T, name).__get__ for name in _PROPERTIES.split() if hasattr(_T, name)]
    + [getattr(_T, name) for name in _METHODS.split() if hasattr(_T, name)]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
    + [f for f in [getattr(torch, "_has_compatible_shallow_copy_type", None)] if f is not None]
)
_DEVICE = _T.device.__get__
_SET_DATA = _T.data.__set__
_CASTS = {_T.float: torch.float32, _T.half: torch.float16, _T.bfloat16: torch.bfloat16}


class Absent(nn.Parameter):
    """A parameter that is on disk. `device` is where it will be when it is used."""

    what: str

    @classmethod
    def of(cls, shape: Iterable[int], dtype: torch.dtype, what: str) -> Any:
        """Return a stand-in; `what` names the parameter and segment in errors."""
        with torch.inference_mode(False):
            meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
            made = torch.Tensor._make_subclass(cls, meta, False)
        made.what = what
        return made

    def to_meta(self) -> Tensor:
        """Return a tensor on meta of this shape and dtype."""
        return torch.empty(tuple(self.shape), dtype=self.dtype, device="meta")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.what})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(_refusal(self, "copied or pickled"))

    def __deepcopy__(self, memo: Any) -> Any:
        raise ModelError(_refusal(self, "copied"))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what needs no values; raise ModelError naming the parameter otherwise."""
        if func == _DEVICE:
            return torch.device("cpu")
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if _changes_nothing(func, args, kwargs or {}):
            return args[0]
        name = getattr(func, "__name__", str(func))
        raise ModelError(_refusal(_first(args, kwargs), f"used by {name}"))


class RowTable(Absent):
    """The table of an embedding: `functional.embedding` gathers the rows it needs from the file."""

    rows: Callable[[Tensor], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Gather rows for `functional.embedding`; otherwise as any absent parameter."""
        if func is nn.functional.embedding:
            ids, table = args[:2]
            if isinstance(table, RowTable) and not isinstance(ids, Absent):
                return table.rows(ids)
        return super().__torch_function__(func, types, args, kwargs)


def _changes_nothing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call asks a parameter to be what it is: `.to("cpu")`, `.float()` of float32."""
    absent, rest = args[0], (*args[1:], *kwargs.values())
    if func is _T.requires_grad_:
        return rest == (False,)
    if func == _SET_DATA:
        return rest[0] is absent
    if func is _T.cpu or func in _CASTS:
        return isinstance(absent, Absent) and absent.dtype is _CASTS.get(func, absent.dtype)
    if func is not _T.to or kwargs.get("copy") or not isinstance(absent, Absent):
        return False
    wanted = [torch.device(x) if isinstance(x, str) else x for x in rest if not isinstance(x, bool)]
    return all(x in (None, absent.dtype, torch.device("cpu")) for x in wanted)


def _first(args: Any, kwargs: Mapping[str, Any] | None) -> Any:
    stack = [*args, *(kwargs or {}).values()]
    while stack:
        item = stack.pop(0)
        if isinstance(item, Absent):
            return item
        if isinstance(item, list | tuple):
            stack.extend(item)
    raise AssertionError("called for an absent parameter")


def _refusal(absent: Any, how: str) -> str:
    return (
        f"{absent.what} is on disk and was {how} outside the forward of the module it streams with; "
        "call that module, or let the model name a larger block in a method stream_order()"
    )
