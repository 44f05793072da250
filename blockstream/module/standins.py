"""Stand-ins for parameters whose weights are not in memory.

A meta tensor in a kernel can silently give garbage (`F.linear` of a real input and a meta weight
does). A stand-in looks like the parameter it stands for to whatever asks (shape, dtype, device; to torch it
is no subclass that overrides functions, which would change the path a module takes), and refuses every
operation by name. The one of an embedding's table gathers rows from the file instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError


class Likeness(Protocol):
    """What a stand-in takes its shape from, and whether it requires grad."""

    @property
    def shape(self) -> Iterable[int]:
        """Return the shape."""

    @property
    def requires_grad(self) -> bool:
        """Return whether it requires grad."""


class Absent(nn.Parameter):
    """A parameter that is on disk, of no storage; `device` is where it will be when it is used."""

    what: str

    @classmethod
    def of(cls, like: Likeness, dtype: torch.dtype, what: str, device: str = "cpu") -> Any:
        """Return a stand-in; `what` names the parameter and segment in errors."""
        with torch.inference_mode(False):
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls,
                tuple(like.shape),
                dtype=dtype,
                device=torch.device(device),
                requires_grad=like.requires_grad,
            )
        made.what = what
        return made

    #: Whoever asks whether functions are overridden is told no, as of any parameter.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer `.to` what the parameter is already; raise ModelError naming it for all else."""
        if func.overloadpacket is torch.ops.aten.to and isinstance(args[0], Absent):
            probe = torch.empty((0,) * args[0].dim(), dtype=args[0].dtype, device=args[0].device)
            if func(probe, *args[1:], **(kwargs or {})) is probe:
                return args[0]
        raise ModelError(_refusal(_first((args, kwargs or {})), f"used by {func.overloadpacket.__name__}"))

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuse to be trained."""
        return self._refuse("used by requires_grad_") if requires_grad else self

    @property
    def data(self) -> Any:
        """Refuse: there is none."""
        return self._refuse("used by data")

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
            self._refuse("given other data")

    def _refuse(self, how: str) -> Any:
        raise ModelError(_refusal(self, how))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.what})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse("copied or pickled")

    def __deepcopy__(self, memo: Any) -> Any:
        self._refuse("copied")


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Absent, *args: Any, **kwargs: Any) -> Any:
        return self._refuse(f"used by {name}")

    return method


#: What reads a tensor's memory past all dispatch.
_PAST_DISPATCH = (
    "numpy", "tolist", "item", "data_ptr", "storage", "untyped_storage", "share_memory_", "__array__",
    "__dlpack__",
)  # fmt: skip
for _name in _PAST_DISPATCH:
    setattr(Absent, _name, _refusing(_name))


class RowTable(Absent):
    """The table of an embedding: `functional.embedding` gathers the rows it needs from the file."""

    rows: Callable[[Tensor], Tensor]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Gather rows for an embedding's lookup; otherwise as any absent parameter."""
        if func.overloadpacket is torch.ops.aten.embedding:
            table, ids = args[:2]
            if isinstance(table, RowTable) and not isinstance(ids, Absent):
                return table.rows(ids)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _first(value: Any) -> Any:
    stack = [value]
    while stack:
        item = stack.pop(0)
        if isinstance(item, Absent):
            return item
        if isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
    raise AssertionError("called for an absent parameter")


def _refusal(absent: Any, how: str) -> str:
    return (
        f"{absent.what} is on disk and was {how} outside the forward of the module it streams with; "
        "call that module, or let the model name a larger block in a method stream_order()"
    )
