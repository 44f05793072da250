"""Which parameters a module's forward takes itself, past the modules that hold them: `x @ self.emb.weight.T`.

Told from the code of its class: chains of attributes from `self` to a parameter, in `forward` and in the
methods that it names. What is only asked (a dtype, a device, a shape) is not taken.
"""

from __future__ import annotations

import dis
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn

#: What may be asked of a parameter without its values.
_ASKED = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "dim", "requires_grad", "is_cuda", "numel", "is_meta"}
)


def reached(root: nn.Module) -> dict[int, set[int]]:
    """Return, by id of a parameter, the ids of the modules that take it out of a module inside them."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for module in root.modules():
        for chain in _chains(type(module)):  # type: ignore[arg-type]
            param = _resolved(module, chain)
            if param is not None:
                found[id(param)].add(id(module))
    return dict(found)


def _resolved(module: nn.Module, chain: tuple[str, ...]) -> nn.Parameter | None:
    owner = module
    for name in chain[:-1]:
        inner = owner._modules.get(name)
        if inner is None:
            return None
        owner = inner
    return owner._parameters.get(chain[-1])


#: Functions that look at what they are given, and take nothing of it.
_ASKING = frozenset({"isinstance", "id", "type", "hasattr"})


@cache
def _chains(cls: type) -> frozenset[tuple[str, ...]]:
    """Return the chains of two attributes and more that a class's forward follows from `self`."""
    if cls.__module__.partition(".")[0] == "torch":
        return frozenset()
    seen: set[str] = set()
    todo, found = ["forward"], set()
    while todo:
        name = todo.pop()
        function = getattr(cls, name, None)
        if name in seen or not isinstance(function, FunctionType):
            continue
        seen.add(name)
        for chain in _followed(function):
            if len(chain) == 1:
                todo.append(chain[0])
            else:
                found.add(chain)
    return frozenset(found)


def _followed(function: FunctionType) -> Iterator[tuple[str, ...]]:
    """Yield the chains of attributes of a method's first argument; what is only asked for is left out."""
    names = function.__code__.co_varnames[:1]
    chain: list[str] | None = None
    called: object = None
    for step in [*dis.get_instructions(function), None]:
        if step is not None and chain is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(step.argval))
            continue
        if chain and chain[-1] not in _ASKED:
            # `self.emb.weight.t` takes the weight as `self.emb.weight` does.
            yield from (tuple(chain[:n]) for n in range(1, len(chain) + 1))
        chain = None
        if step is not None and step.opname.startswith("LOAD_FAST"):
            last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            chain = [] if last in names and called not in _ASKING else None
        if step is not None and step.opname not in ("PUSH_NULL", "CACHE"):
            called = step.argval if step.opname == "LOAD_GLOBAL" else None
