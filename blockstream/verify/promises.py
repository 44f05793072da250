"""What a device does not promise: operations of torch whose bits may differ from run to run on CUDA."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Forward operations that torch lists as nondeterministic on CUDA (`torch.use_deterministic_algorithms`):
#: they add by atomics, in whatever order. Those of backward passes are left out: nothing is trained.
UNPROMISED = frozenset(
    {
        *("bincount", "cumsum", "cumsum_", "histc", "histogram", "kthvalue", "median", "put_", "put"),
        *("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_"),
        *("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "_ctc_loss"),
        *("index_put", "index_put_", "_index_put_impl_"),
    }
)
#: Of these only what accumulates.
_IF_ACCUMULATING = frozenset({"index_put", "index_put_", "_index_put_impl_", "put", "put_"})


class Unpromised(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of operations, computed in its block, of which a device promises no equal bits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in UNPROMISED and (name not in _IF_ACCUMULATING or _accumulates(args, kwargs or {})):
            self.names.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def _accumulates(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("accumulate", args[3] if len(args) > 3 else False))
