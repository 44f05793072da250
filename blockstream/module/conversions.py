"""What transformers does to a checkpoint's tensors on loading.

Its own table says which tensors a parameter is made of: one of another name, several that lie one after
another in the parameter (experts), or a part of one (a query out of a joined qkv). All of these are read
as they lie. What any other operation makes is computed once, by `blockstream pack`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """The tensors a parameter or buffer is made of, in the order their bytes are laid out.

    Where it is a part of a tensor, the entry has the tensor's name and the part's shape and extent.
    """

    tensors: tuple[TensorEntry, ...]
    #: What computes the parameter if it cannot be read; `tensors` then only says its name, dtype and shape.
    made: Computed | None = None

    @property
    def dtype(self) -> str:
        """Return the dtype in the file."""
        return self.tensors[0].dtype


@dataclass(frozen=True)
class Computed:
    """A parameter that a converter of transformers computes from a checkpoint's tensors."""

    path: str
    converter: Any
    parts: Mapping[str, Sequence[TensorEntry]]
    module: nn.Module

    @property
    def inputs(self) -> list[TensorEntry]:
        """Return the tensors it is computed from."""
        return [t for one in self.parts.values() for t in one]

    @property
    def operations(self) -> str:
        """Return the names of the operations, in order."""
        return ", ".join(type(o).__name__ for o in self.converter.operations)

    def tensor(self, read: Callable[[TensorEntry], Tensor]) -> Tensor:
        """Compute the parameter from tensors read whole.

        Raises CheckpointError when the operations do not make it of them.
        """
        values: dict[str, Any] = {p: [read(t) for t in one] for p, one in self.parts.items()}
        targets = self.converter.target_patterns
        for operation in self.converter.operations:
            values = operation.convert(
                values,
                source_patterns=self.converter.source_patterns,
                target_patterns=targets,
                full_layer_name=self.path,
                model=self.module,
                config=self.module.config,
                missing_keys=None,
            )
        value = next((v for key, v in values.items() if key in self.path), None)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        shape = self.module.get_parameter(self.path).shape
        if not isinstance(value, Tensor) or value.shape != shape:
            made = list(value.shape) if isinstance(value, Tensor) else "nothing"
            raise CheckpointError(
                f"parameter {self.path!r} has shape {list(shape)} and {self.operations} makes {made} of "
                f"{', '.join(t.name for t in self.inputs[:3])}; is this the checkpoint of another model?"
            )
        return value.contiguous()


def library_match(module: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Source] | None:
    """Return the sources by transformers' own table; None for modules of others."""
    if not hasattr(module, "base_model_prefix") or not hasattr(module, "config"):
        return None
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    except ImportError:  # none, or one whose names are those of its files
        return None
    if not isinstance(module, PreTrainedModel):
        return None
    table = get_model_conversion_mapping(module)
    converters = [t for t in table if isinstance(t, WeightConverter)]
    renamings = [t for t in table if not isinstance(t, WeightConverter)]
    meta = dict.fromkeys(wanted, True)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict(keep_vars=True).items()}
    found: dict[str, Source] = {}
    collected: dict[str, dict[str, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        entry = checkpoint.entries[key]
        if key in wanted and entry.shape == shapes.get(key):
            found[key] = Source((entry,))
            continue
        target, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, meta)  # type: ignore[arg-type]
        if target not in wanted:
            continue
        if pattern is None:
            found.setdefault(target, Source((entry,)))
        else:
            collected[target][pattern].append(entry)
    for target, parts in collected.items():
        converter = next(c for c in converters if set(parts) <= set(c.source_patterns))
        for name, source in _converted(module, target, converter, parts):
            found.setdefault(name, source)
    return found


def _converted(
    module: nn.Module, target: str, converter: Any, parts: Mapping[str, list[TensorEntry]]
) -> Iterator[tuple[str, Source]]:
    """Yield the parameters a converter makes of some tensors."""
    steps = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
    lists = [parts[p] for p in converter.source_patterns if p in parts]
    complete = len(lists) == len(converter.source_patterns) and len({len(x) for x in lists}) == 1
    targets = converter.target_patterns
    if complete and len(targets) == 1:
        if steps in ([("MergeModulelist", 0)], [("Concatenate", 0)]):
            yield target, Source(tuple(t for one in lists for t in one))
            return
        if steps == [("MergeModulelist", 0), ("Concatenate", 1)]:
            # Stacked, then joined along the next dimension: expert by expert, each one's parts in turn.
            yield target, Source(tuple(t for expert in zip(*lists, strict=True) for t in expert))
            return
    first = next((t for t in targets if t in target), target)
    names = [target.replace(first, t) for t in targets] if len(targets) > 1 else [target]
    whole = lists[0][0]
    if complete and steps == [("Chunk", 0)] and whole.shape and whole.shape[0] % len(names) == 0:
        for i, name in enumerate(names):
            yield name, Source((_part(whole, i, len(names)),))
        return
    for name in names:
        stand_in = replace(whole, name=name, shape=tuple(module.get_parameter(name).shape))
        yield name, Source((stand_in,), Computed(name, converter, parts, module))


def _part(whole: TensorEntry, i: int, of: int) -> TensorEntry:
    """Return the i-th of equal parts of a tensor along its first dimension."""
    if whole.coded is not None and whole.coded.beside:
        raise CheckpointError(
            f"{whole.file.path}: {whole.name!r} is in format {whole.dtype} and several parameters are parts "
            "of it, which its scales are not cut for; write it dequantised with the library that quantised it"
        )
    rows, nbytes = whole.shape[0] // of, whole.nbytes // of
    return replace(whole, shape=(rows, *whole.shape[1:]), offset=whole.offset + i * nbytes, nbytes=nbytes)
