"""Bind a loaded segment: its parameters become cached views of the arena.

The views of a segment at one room are made once. Binding assigns them into the modules'
`_parameters`, unbinding puts the stand-ins back: no allocation, no copy. Before a segment goes,
whoever still holds its storage is found by counting references.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from blockstream.checkpoint.read.requests import Placed
from blockstream.engine.arena import Arena
from blockstream.engine.store import Handle, Loading, Store
from blockstream.errors import AliasError, ModelError
from blockstream.plan.loads import Load
from blockstream.plan.segments import Extent

from .dtypes import to_torch
from .narrow import Narrow, Spec
from .standins import Absent

#: What holds no tensors that a result could be about, and how far attributes of attributes are followed.
_PLAIN = (str, bytes, int, float, bool, type, FunctionType, nn.Module)
DEEPEST = 4


class Spot(NamedTuple):
    """One place of a parameter: the module, its name there, the stand-in while it is not loaded."""

    module: nn.Module
    name: str
    absent: Absent


class Laid(Protocol):
    """Where the parameters of a segment lie in its room."""

    @property
    def nbytes(self) -> int:
        """Return the room's bytes."""

    @property
    def tensors(self) -> Mapping[str, Placed]:
        """Return each parameter's place."""


class Rooms(Protocol):
    """Memory whose extents are tensors; `address` is that of its first byte."""

    address: int

    def room(self, extent: Extent) -> Tensor:
        """Return uint8 [nbytes] with a storage of its own: who holds it is told apart from the rest."""


class HostRooms:
    """The rooms of an arena in host memory."""

    def __init__(self, arena: Arena) -> None:
        self.address = arena.address
        self._arena = arena

    def room(self, extent: Extent) -> Tensor:
        """Return a tensor of an extent."""
        return torch.frombuffer(self._arena.view(extent), dtype=torch.uint8)


#: The attribute that tells parameters in an arena from those that somebody puts in their place.
_OURS = "_of_arena"


class _Views:
    """The parameters of one segment at one room of the arena."""

    def __init__(self, rooms: Rooms, offset: int, layout: Laid, specs: Mapping[str, Spec]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # One storage for the whole room: its references are counted in one call.
            room = rooms.room(Extent(offset, layout.nbytes))
            views = {
                name: room[p.offset : p.offset + p.nbytes].view(to_torch(p.dtype)).view(p.shape)
                for name, p in layout.tensors.items()
            }
            self.params = {}
            for path, spec in specs.items():
                beside = {
                    name.removeprefix(f"{path}:"): name for name in views if name.startswith(f"{path}:")
                }
                found = {part: views.pop(name) for part, name in beside.items()}
                self.params[path] = Narrow.of(spec, views.pop(path), found)
            for name in list(views):
                self.params[name] = nn.Parameter(views.pop(name), requires_grad=False)
            for param in self.params.values():
                setattr(param, _OURS, True)
        self._room = room
        self.begin = rooms.address + offset
        self.end = self.begin + layout.nbytes
        self._storage = room.untyped_storage()
        self._listed = list(self.params.values())
        self._uses = self._count_uses()
        self._references: int | None = None

    def _count_uses(self) -> int:
        uses: int = torch._C._storage_Use_Count(self._storage._cdata)
        return uses

    def settle(self) -> None:
        """Take the references that binding itself holds as the ones that may be."""
        if self._references is None:
            self._references = sum(map(sys.getrefcount, self._listed))

    def held_elsewhere(self) -> bool:
        """Return whether anything but the bound modules holds a view, or a parameter itself."""
        return self._count_uses() != self._uses or sum(map(sys.getrefcount, self._listed)) != self._references

    def become(self, absents: Mapping[str, Absent]) -> bool:
        """Make each parameter a stand-in, whoever holds it; False where a tensor shares its memory."""
        if self._count_uses() != self._uses:
            return False
        for name, param in self.params.items():
            absent = absents[name]
            stand_in = type(absent).of(absent, absent.dtype, absent.what)
            torch.utils.swap_tensors(param, stand_in)  # type: ignore[no-untyped-call]
        return True

    @property
    def version(self) -> int:
        """Return the count of writes through torch."""
        return self._room._version


def is_streamed(param: Any) -> bool:
    """Return whether a parameter is a stand-in, or one of an arena, and not somebody's own."""
    return isinstance(param, Absent) or hasattr(param, _OURS)


def trained_beside(module: nn.Module, computed: Container[str]) -> str | None:
    """Return the path of a parameter that requires grad, not streamed and not `computed` (an adapter's)."""
    named = module.named_parameters()
    return next((x for x, p in named if p.requires_grad and not is_streamed(p) and x not in computed), None)


class Binding:
    """The parameters of one segment, wherever they are bound. Compute thread only."""

    def __init__(
        self,
        name: str,
        spots: Sequence[tuple[str, Sequence[Spot]]],
        layout: Laid,
        rooms: Rooms,
        specs: Mapping[str, Spec] = MappingProxyType({}),
    ) -> None:
        """`spots` lists (parameter's name in the layout, its places); `specs` are those of coded weights.

        A parameter requires grad where its stand-in does.
        """
        self.name = name
        self._specs = specs
        self.layout = layout
        self._rooms = rooms
        self._by_room: dict[int, _Views] = {}
        self._spots = spots
        #: (module._parameters, name, parameter's name, stand-in) of every place.
        self._assignments: list[tuple[dict[str, Any], str, str, Absent]] = [
            (s.module._parameters, s.name, param, s.absent) for param, places in spots for s in places
        ]
        modules = {id(s.module): s.module for _, places in spots for s in places}
        self._recurrent = [m for m in modules.values() if isinstance(m, nn.RNNBase)]
        self._views: _Views | None = None
        self._version = 0
        self.bound_by: object | None = None

    def bind(self, by: object, offset: int) -> None:
        """Assign the views at a room; nothing to do if `by` has it bound already."""
        if self.bound_by is by:
            return
        views = self._by_room.get(offset)
        if views is None:
            views = self._by_room[offset] = _Views(self._rooms, offset, self.layout, self._specs)
        for table, name, param, absent in self._assignments:
            self._refuse_replaced(param, table.get(name))
            table[name] = views.params[param]
            if table[name].requires_grad is not absent.requires_grad:
                table[name].requires_grad = absent.requires_grad
        self._flatten()
        self.bound_by, self._views, self._version = by, views, views.version
        views.settle()

    def _refuse_replaced(self, param: str, found: Any) -> None:
        """Raise ModelError for what somebody has put in a stand-in's place: it would not be computed with."""
        if found is None or is_streamed(found):
            return
        raise ModelError(
            f"parameter {param!r} of segment {self.name!r} was replaced while it streams, and every load "
            "would put its checkpoint's back; write the new one to a checkpoint and stream that, or put a "
            "module of your own in the place of the parameter's"
        )

    def unbind(self, by: object) -> None:
        """Put the stand-ins back if `by` has the segment bound."""
        if self.bound_by is not by:
            return
        for table, name, _, absent in self._assignments:
            table[name] = absent
        self._flatten()
        self.bound_by = self._views = None

    def give_up(self, by: object) -> str | None:
        """Put the stand-ins back after a time in which anybody could take the parameters.

        Returns what somebody did to them that is lost by it. A parameter that somebody has kept becomes a
        stand-in itself, as it would be had it been taken while the segment was on disk: what it was a view
        of is about to be another's.
        """
        views = self._views
        if views is None or self.bound_by is not by:
            return None
        lost = f"segment {self.name!r} was written to" if views.version != self._version else None
        for table, name, param, _ in self._assignments:
            if table.get(name) is not views.params[param]:
                lost = f"parameter {param!r} of segment {self.name!r} was replaced"
        kept = views.held_elsewhere()
        self.unbind(by)
        if kept and views.become({param: places[0].absent for param, places in self._spots}):
            self._by_room = {at: v for at, v in self._by_room.items() if v is not views}
        return lost

    def check(self, output: Any, module: str) -> None:
        """Raise AliasError if anything shares the segment's memory, ModelError if it was written to.

        `output` is what `module` returned; it is looked through to name the culprit.
        """
        views = self._views
        if views is None:
            return
        if views.version != self._version:
            self._version = views.version
            raise ModelError(
                f"module {module!r} writes to its weights; streamed weights are read-only, as the next load "
                "would lose what was written"
            )
        if not views.held_elsewhere():
            return
        path = next((p for p, t in tensors_in(output) if self._holds(t)), None)
        if path is None:
            gc.collect()  # cycles that forward left behind are no alias
            if not views.held_elsewhere():
                return
        where = f"its output{path}" if path is not None else "a cache, list or autograd graph"
        raise AliasError(
            f"module {module!r}: {where} shares memory with the weights of segment {self.name!r}, which are "
            "about to be replaced; return or keep a copy (.clone())"
        )

    def forget(self) -> None:
        """Drop the views, so that the arena can go."""
        self._by_room.clear()
        self._views = None

    def _holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory is the segment's."""
        assert self._views is not None
        address = address_of(tensor)
        return address is not None and self._views.begin <= address < self._views.end

    def _flatten(self) -> None:
        """Rebuild the lists recurrent layers keep of their weights."""
        for module in self._recurrent:
            names = module._flat_weights_names
            module.__dict__["_flat_weights"] = [module._parameters.get(n) for n in names]


class BoundHandle:
    """A loaded segment that can be bound. Implements `blockstream.engine.store.Handle`."""

    def __init__(self, inner: Handle, binding: Binding, room: Extent) -> None:
        self._inner, self.binding, self._room = inner, binding, room

    def bind(self) -> None:
        """Make the segment's parameters those of the modules, for compute that begins once they are there."""
        self._inner.read()
        self.binding.bind(self, self._room.offset)

    def read(self) -> None:
        """Have compute wait for the segment."""
        self._inner.read()

    def release(self) -> None:
        """Unbind and give the segment up."""
        self.binding.unbind(self)
        self._inner.release()


class BoundLoading:
    """A load whose handle binds parameters. Implements `blockstream.engine.store.Loading`."""

    def __init__(self, inner: Loading, binding: Binding, room: Extent) -> None:
        self._inner, self._binding, self._room = inner, binding, room

    def finish(self, nearly: Callable[[], None]) -> BoundHandle:
        """Return the segment once it is there."""
        return BoundHandle(self._inner.finish(nearly), self._binding, self._room)

    def abandon(self) -> None:
        """Give the load up."""
        self._inner.abandon()


class BindingStore:
    """A store whose handles bind parameters. Implements `blockstream.engine.store.Store`."""

    def __init__(self, inner: Store, bindings: dict[tuple[str, str], Binding]) -> None:
        self._inner, self._bindings = inner, bindings

    def begin(self, load: Load) -> BoundLoading:
        """Begin to load a segment. Loader thread."""
        binding = self._bindings[load.stage, load.segment.name]
        return BoundLoading(self._inner.begin(load), binding, load.extent)

    def close(self) -> None:
        """Close the store within."""
        self._inner.close()


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of the tensors in nested containers and in objects' attributes, each once."""
    seen: set[int] = set()
    stack = [("", value, 0)]
    while stack:
        path, item, depth = stack.pop()
        if item is None or isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield path, item
        elif isinstance(item, Mapping):
            stack += [(f"{path}[{key!r}]", x, depth) for key, x in item.items()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += [(f"{path}[{i}]", x, depth) for i, x in enumerate(item)]
        elif hasattr(item, "__dict__") and depth < DEEPEST:
            stack += [(f"{path}.{key}", x, depth + 1) for key, x in vars(item).items()]


def address_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's first element; None where it has none."""
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError, ModelError):  # sparse, wrapper subclasses, stand-ins
        return None
