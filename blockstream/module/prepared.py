"""One module made ready to stream: which tensors each segment reads, what stands in for them.

`Prepared` owns every change made to the module besides its hooks, and undoes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.requests import SegmentLayout
from blockstream.errors import CheckpointError
from blockstream.module.layers.int8 import Int8Layers, Product, resolve

from .adapters import BASE, base_of
from .binding import Binding, Laid, Rooms, Spot
from .dtypes import COMPUTED, FROM_TORCH, to_torch
from .experts import Experts
from .guards import guard, reopen, shut, unguard
from .heads import read_apart
from .libraries import built_in, dtype_for, library_of, stays_float32
from .match import match, require_parameters
from .partition import Part, Partition, Place, partition
from .row_tables import TableReader
from .shelf import Shelf
from .standins import Absent, RowTable
from .weights import Weight, read_buffer, read_entry, weight_of

#: What of torch computes fused where no gradient could be asked for.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cut:
    """How a module is cut into segments.

    `parts` with their `layouts` by name and `kinds` (parts of one kind compute alike), `tables` read by row,
    and the order of paths that the module `declared`, empty if it names none; `experts` are in no part.
    """

    parts: tuple[Part, ...]
    layouts: Mapping[str, SegmentLayout]
    kinds: tuple[tuple[type, int], ...]
    tables: tuple[tuple[Place, ...], ...]
    declared: tuple[str, ...]
    named: Named
    experts: tuple[Experts, ...] = ()


@dataclass(frozen=True)
class Named:
    """A module's modules and weights by the paths they have: adapters, loaded since, wrap some of them."""

    modules: Mapping[str, nn.Module]
    weights: Mapping[str, Weight]


class Prepared:
    """A module, its parts and the layouts of their segments.

    Layers that the checkpoint holds in int8 become `Int8Linear`, computing `int8` products; nothing else of
    the module is changed until `install`, and `restore` undoes both exactly. Raises
    CheckpointError or ModelError when the checkpoint is not the module's. For `packing` it only says how
    the module is cut: what the library computes of a checkpoint is not refused.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        checkpoint: Checkpoint,
        dtype: str | None,
        *,
        packing: bool = False,
        int8: Product | None = None,
    ) -> None:
        #: The module as it was given: one that peft has wrapped, or the same.
        self.outer = module
        module = base_of(module)
        require_parameters(module)
        reopen(module)
        self.name = name
        self.module = module
        #: What marks synthetic weights; None for real ones.
        self.synthetic = checkpoint.synthetic
        self.form = checkpoint.form
        self.matched = match(module, checkpoint, packing=packing)
        #: Whether it looks at which parameters require grad before it computes fused.
        self.looks_at_grad = any(
            p.requires_grad for m in module.modules() if isinstance(m, _FUSED) for p in m.parameters()
        )
        #: How layers with int8 weights multiply.
        self.int8 = int8 or resolve("auto")
        self._int8 = Int8Layers(module, self.matched.sources, checkpoint.root, self.int8)
        self._int8.apply()
        self._dtype = dtype_for(module, checkpoint, dtype)
        #: The module as its library would have built it for that dtype.
        self._like = built_in(module, self._dtype)
        self._built_in = {p.dtype for p in self._like.parameters()}
        self._own = self.matched.computed
        #: The weights that each module holds, whatever its path may come to be.
        self._held: dict[int, dict[str, Weight]] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for key, param in owner._parameters.items():
                path = f"{prefix}.{key}" if prefix else key
                if param is not None and path in self.matched.sources:
                    weight = weight_of(path, param, self.matched.sources[path], self._dtype_for(path))
                    self._held.setdefault(id(owner), {})[key] = weight
        self._sources = self._name().weights
        self._readers: list[TableReader] = []
        self.shelf: Shelf | None = None  # serves what is read by parts
        self._where = CPU
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._extra: list[tuple[nn.Module, Any]] = []
        self.use(self.cut())

    def cut(self, finer: int | None = None, apart: bool = False) -> Cut:
        """Return the module cut into segments, none above `finer` bytes where that can be helped.

        `apart`: experts, in the finest cut heads, are read by parts. It is cut so once that is put to `use`.
        """
        named = self._name()
        experts = read_apart(self.module, named.weights, finer == 1) if apart else ()
        made = self._partition(finer, named, experts)
        layouts = {
            part.name: lay_out(part.name, [r for x in part.params for r in named.weights[x[0].path].requests])
            for part in made.parts
        }
        for places in made.tables:  # not read whole, but held to the same rules
            weight = named.weights[places[0].path]
            lay_out(f"table.{weight.path}", weight.requests)
            read = sum(len(r.tensors) for r in weight.requests)
            if read > 1:
                raise CheckpointError(
                    f"table {weight.path!r} is made of {read} tensors and cannot be read row by row; save it "
                    "as one tensor"
                )
        kinds = tuple(
            (type(self.module.get_submodule(p.entry or "")), layouts[p.name].bound_nbytes) for p in made.parts
        )
        return Cut(made.parts, layouts, kinds, made.tables, made.order, named, experts)

    def _name(self) -> Named:
        """Return the module's modules and weights by the paths they have now."""
        modules = dict(self.module.named_modules(remove_duplicate=False))
        weights = {
            f"{prefix}.{name}" if prefix else name: weight
            for prefix, owner in modules.items()
            for name, weight in self._held.get(id(owner), {}).items()
        }
        return Named(modules, weights)

    def use(self, cut: Cut) -> None:
        """Cut the module so from the next `install` on; while it is installed it is not cut anew."""
        self._int8.apply()
        self._cut = cut

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts of the module as it is cut."""
        return self._cut.parts

    @property
    def layouts(self) -> Mapping[str, SegmentLayout]:
        """Return the layout of each segment by name."""
        return self._cut.layouts

    def _partition(self, finer: int | None, named: Named, experts: Sequence[Experts]) -> Partition:
        weights = named.weights
        # What was added since (an adapter) and what is computed stays as it is.
        others = {p for p, _ in self.module.named_parameters(remove_duplicate=False) if p not in weights}
        others |= {place.path for each in experts for place in each.places}
        return partition(self.module, lambda path: weights[path].nbytes, finer=finer, without=others)

    @property
    def outside(self) -> list[str]:
        """Return the modules that use what stays resident: they may be called by themselves."""
        resident = [part for part in self.parts if part.resident]
        return list(dict.fromkeys(x.module for part in resident for places in part.params for x in places))

    @property
    def tables(self) -> list[str]:
        """Return the parameters that are gathered row by row."""
        return [places[0].path for places in self._cut.tables]

    @property
    def experts(self) -> tuple[Experts, ...]:
        """Return the experts that are read one by one."""
        return self._cut.experts

    @property
    def gathered_nbytes(self) -> int:
        """Return the bytes read so far for rows of tables."""
        return sum(r.read_nbytes for r in self._readers)

    def dtype_of(self, path: str) -> torch.dtype:
        """Return the dtype a parameter has while it is bound."""
        if path in self._own:
            return self._like.get_parameter(path).dtype
        return to_torch(self.weight(path).dtype)

    def empty_weight(self, path: str) -> nn.Parameter:
        """Return a parameter as it is while it is bound, of no particular values."""
        if path in self._own:
            own = self._own[path]
            data = torch.empty(own.shape, dtype=self.dtype_of(path), device="cpu")
            return nn.Parameter(data, requires_grad=False)
        if path not in self._sources and path not in (now := self._name().weights):
            own = self.module.get_parameter(path)  # an adapter's
            return nn.Parameter(torch.empty(own.shape, dtype=own.dtype, device="cpu"), requires_grad=False)
        return (self._sources.get(path) or now[path]).empty()

    def nbytes_of(self, path: str) -> int:
        """Return the bytes of a parameter while it is bound."""
        if path in self._own:
            return self._own[path].numel() * self.dtype_of(path).itemsize
        return self.weight(path).nbytes

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Return what parameters are read as, by the paths that they have now."""
        return self._name().weights

    def owner(self, place: Place) -> nn.Module:
        """Return the module that has a place of a part, whatever wraps it now."""
        return self._cut.named.modules[place.module]

    def weight(self, path: str) -> Weight:
        """Return what a parameter is read as, by the path it had at the start or has now."""
        return self._sources.get(path) or self._name().weights[path]

    # -- changes to the module ---------------------------------------------------------------

    def install(self, where: torch.device = CPU) -> None:
        """Put stand-ins in the place of all parameters and load the stored buffers to where compute is."""
        reopen(self.module)
        self._where = where
        self._absent: dict[Place, Absent] = {}
        try:
            for places in self._cut.tables:
                self._install_table(places)
            for part in self.parts:
                for places in part.params:
                    self._stand_in(places, f"parameter {places[0].path!r} of segment {part.name!r}")
            for each in self._cut.experts:
                for place in each.places:
                    self._stand_in((place,), f"parameter {place.path!r}, read by parts,", each.table)
            self._cast_buffers()
            self._load_buffers()
            self._set_own()
            self._load_extra()
            if where != CPU:
                self._move_buffers()
            guard(self.module)
        except BaseException:
            self.restore()
            raise

    def bindings(
        self, rooms: Rooms, layouts: Mapping[str, Laid] | None = None
    ) -> dict[tuple[str, str], Binding]:
        """Return what binds each segment in some memory, by (stage, segment); `layouts` are those there."""
        layouts = self.layouts if layouts is None else layouts
        made, named = {}, self._cut.named
        for part in self.parts:
            spots = [
                (
                    named.weights[places[0].path].path,
                    [Spot(named.modules[x.module], x.name, self._absent[x]) for x in places],
                )
                for places in part.params
            ]
            specs = {path: spec for path, _ in spots if (spec := self._sources[path].spec) is not None}
            made[self.name, part.name] = Binding(part.name, spots, layouts[part.name], rooms, specs)
        return made

    def restore(self) -> None:
        """Give the module back its own parameters and buffers; close the tables. Idempotent.

        A module whose own parameters are on meta refuses to be called from then on.
        """
        unguard(self.module)
        self.shelf = None
        for table, name, value in reversed(self._undo):
            table[name] = value
        with torch.inference_mode():  # writes to tensors of any mode
            for buffer, value in self._values:
                buffer.copy_(value)
        for module, state in self._extra:
            module.set_extra_state(state)
        self._extra.clear()
        self._undo.clear()
        self._values.clear()
        for reader in self._readers:
            reader.close()
        self._int8.undo()
        shut(self.module)

    def _dtype_for(self, path: str) -> str | None:
        """Return the dtype asked for, another where the module or its library says so; scales stay theirs."""
        dtype = self._dtype
        if dtype is None or path in self._int8.scales:
            return None
        if stays_float32(self.module, path, dtype):
            return "F32"
        if library_of(self.module) == "transformers":
            plain = path if self._like is self.module else BASE.sub("", path)
            own = FROM_TORCH.get(self._like.get_parameter(plain).dtype)
            return own if to_torch(dtype) in self._built_in and own in COMPUTED else dtype
        return dtype

    def _stand_in(self, places: tuple[Place, ...], what: str, kind: type[Absent] = Absent) -> Absent:
        path = places[0].path
        absent: Absent = kind.of(self.weight(path), self.dtype_of(path), what, str(self._where))
        for place in places:
            self._replace(self._cut.named.modules[place.module]._parameters, place.name, absent)
            self._absent[place] = absent
        return absent

    def _install_table(self, places: tuple[Place, ...]) -> None:
        weight = self.weight(places[0].path)
        reader = TableReader(weight.tensors[0], weight.dtype, weight.spec)
        self._readers.append(reader)
        table = self._stand_in(places, f"table {places[0].path!r}, which is read row by row and", RowTable)
        assert isinstance(table, RowTable)
        table.rows = reader.gather

    def _replace(self, table: dict[str, Any], name: str, value: Any) -> None:
        self._undo.append((table, name, table[name]))
        table[name] = value

    def _move_buffers(self) -> None:
        """Put the buffers' values on the device, where they stay."""
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    self._replace(module._buffers, name, buffer.to(self._where))

    def _cast_buffers(self) -> None:
        """Give floating buffers the dtype they have in a module that was built for the one asked for.

        A library's module says so itself; another's are cast, as `.to(dtype)` does, if one was named.
        """
        if self._dtype is None:
            return
        wanted = to_torch(self._dtype)
        alike = dict(self._like.named_buffers(remove_duplicate=False))
        for prefix, module in self.module.named_modules():
            for name, buffer in module._buffers.items():
                path = f"{prefix}.{name}" if prefix else name
                if buffer is None or not buffer.is_floating_point():
                    continue
                value = alike.get(path, buffer)
                library = library_of(self.module)
                # What a file holds diffusers brings to the dtype as well, whatever the buffer was built in.
                stored = path in self.matched.sources and name not in module._non_persistent_buffers_set
                if library is None or (library == "diffusers" and stored):
                    kept = stays_float32(self.module, path, self._dtype)
                    value = buffer.to(torch.float32 if kept and stored else buffer.dtype if kept else wanted)
                if value.dtype is not buffer.dtype:
                    self._replace(module._buffers, name, value)

    def _load_buffers(self) -> None:
        """Load the buffers the checkpoint holds, in their own dtype, as `load_state_dict` would."""
        for prefix, module in self.module.named_modules():
            for name, buffer in module._buffers.items():
                path = f"{prefix}.{name}" if prefix else name
                source = self.matched.sources.get(path)
                if buffer is None or source is None or name in module._non_persistent_buffers_set:
                    continue
                value = read_buffer(path, source, tuple(buffer.shape)).to(buffer.dtype)
                if buffer.is_meta:
                    self._replace(module._buffers, name, value)
                else:
                    self._values.append((buffer, buffer.clone()))
                    with torch.no_grad():
                        buffer.copy_(value)

    def _load_extra(self) -> None:
        """Give modules the state of their own that the checkpoint holds as a tensor."""
        for prefix, module in self.module.named_modules():
            entry = self.matched.whole.get(f"{prefix}._extra_state" if prefix else "_extra_state")
            if entry is not None and type(module).set_extra_state is not nn.Module.set_extra_state:
                self._extra.append((module, module.get_extra_state()))
                module.set_extra_state(read_entry(entry))

    def _set_own(self) -> None:
        """Set the parameters that are computed: they stay, and are in no segment."""
        for path, value in self._own.items():
            prefix, _, name = path.rpartition(".")
            own = nn.Parameter(value.to(self._where, self.dtype_of(path)), requires_grad=False)
            self._replace(self._cut.named.modules[prefix]._parameters, name, own)
