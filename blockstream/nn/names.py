"""Match a module's parameters and buffers with a checkpoint's tensors.

Names may differ by a wrapper's prefix, by the renamings transformers applies on loading, and by
parameters that stack several tensors (experts). What cannot be read as it lies asks for a pack.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.errors import CheckpointError, ModelError

#: Tensors older files hold and newer modules compute: missing them in the module is no mistake.
_BOOKKEEPING = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked|relative_position_index|"
    r"attn\.bias|attention\.bias|rotary_emb\.(cos|sin)_cached)$"
)


@dataclass(frozen=True)
class Source:
    """The tensors a parameter or buffer is made of, in the order their bytes are laid out."""

    tensors: tuple[TensorEntry, ...]

    @property
    def dtype(self) -> str:
        """Return the dtype in the file."""
        return self.tensors[0].dtype


@dataclass(frozen=True)
class Matched:
    """What a checkpoint holds for a module: sources by name; tied names share one source.

    `unused` are tensors the module has no place for.
    """

    sources: Mapping[str, Source]
    unused: tuple[str, ...]


def match(module: nn.Module, checkpoint: Checkpoint) -> Matched:
    """Return the sources of a module's parameters and stored buffers.

    Raises CheckpointError naming what is missing, what the module has no place for although it has
    the layer, and what would have to be converted.
    """
    groups = _tied(module)
    wanted = {name for group in groups for name in group} | set(_stored_buffers(module))
    found = _library_match(module, checkpoint, wanted) or {}
    if not _covers(found, groups):
        plain = _prefix_match(checkpoint, wanted)
        if len(plain) > len(found):
            found = plain
    sources: dict[str, Source] = {}
    missing: list[str] = []
    for group in groups:
        source = next((found[name] for name in group if name in found), None)
        if source is None:
            missing.append(group[0])
        else:
            sources.update(dict.fromkeys(group, source))
    if missing:
        raise CheckpointError(
            f"{checkpoint.root}: has no tensor for {len(missing)} of {len(groups)} parameters of "
            f"{type(module).__name__} ({', '.join(missing[:4])}); it holds {len(checkpoint)}, such as "
            f"{', '.join(checkpoint.names[:2])}: is this the checkpoint of another model?"
        )
    sources.update({name: found[name] for name in _stored_buffers(module) if name in found})
    used = {t.name for s in found.values() for t in s.tensors}
    unused = tuple(n for n in checkpoint.names if n not in used)
    _refuse_foreign(module, checkpoint, unused)
    return Matched(sources, unused)


def _tied(module: nn.Module) -> list[list[str]]:
    """Return the parameters' names, those of one tied parameter together."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, param in module.named_parameters(remove_duplicate=False):
        groups[id(param)].append(name)
    return list(groups.values())


def _stored_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers a state dict holds."""
    names = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def _covers(found: Mapping[str, Source], groups: Iterable[list[str]]) -> bool:
    return all(any(name in found for name in group) for group in groups)


def _prefix_match(checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Source]:
    """Return the match under the one prefix, to strip or to add, that fits the most names."""
    names = checkpoint.entries
    strips, adds = {""}, {""}
    some = sorted(wanted, key=len, reverse=True)[:3]
    for want in some:
        strips.update(n.removesuffix(want) for n in names if n.endswith("." + want))
    for name in sorted(names, key=len, reverse=True)[:3]:
        adds.update(w.removesuffix(name) for w in wanted if w.endswith("." + name))
    best: dict[str, Source] = {}
    for strip in sorted(strips, key=len):
        for add in sorted(adds, key=len) if not strip else [""]:
            fits = {
                add + n.removeprefix(strip): Source((e,))
                for n, e in names.items()
                if n.startswith(strip) and add + n.removeprefix(strip) in wanted
            }
            if len(fits) > len(best):
                best = fits
    return best


# -- the renamings of transformers ---------------------------------------------------------------


def _library_match(module: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Source] | None:
    """Return the match by transformers' own table of renamings; None for other modules."""
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
    plain: dict[str, Source] = {}
    stacks: dict[str, dict[str, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        entry = checkpoint.entries[key]
        if key in wanted:
            plain[key] = Source((entry,))
            continue
        target, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, meta)  # type: ignore[arg-type]
        if target not in wanted:
            continue
        if pattern is None:
            plain.setdefault(target, Source((entry,)))
        else:
            stacks[target][pattern].append(entry)
    for target, parts in stacks.items():
        if target not in plain:
            converter = next(c for c in converters if set(parts) <= set(c.source_patterns))
            plain[target] = _stacked(checkpoint, target, converter, parts)
    return plain


def _stacked(
    checkpoint: Checkpoint, target: str, converter: Any, parts: Mapping[str, list[TensorEntry]]
) -> Source:
    """Return the tensors of a stacked parameter in the order of their bytes; refuse other operations."""
    steps = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
    lists = [parts[p] for p in converter.source_patterns if p in parts]
    complete = len(lists) == len(converter.source_patterns) and len({len(x) for x in lists}) == 1
    if complete and len(converter.target_patterns) == 1:
        if steps in ([("MergeModulelist", 0)], [("Concatenate", 0)]):
            return Source(tuple(t for one in lists for t in one))
        if steps == [("MergeModulelist", 0), ("Concatenate", 1)]:
            # Stacked, then joined along the next dimension: expert by expert, each one's parts in turn.
            return Source(tuple(t for expert in zip(*lists, strict=True) for t in expert))
    raise CheckpointError(
        f"{checkpoint.root}: parameter {target!r} is made of {sum(map(len, lists))} tensors by "
        f"{', '.join(name for name, _ in steps)}, which cannot be read as they lie; write the checkpoint "
        "once with `blockstream pack`"
    )


# -- what is left over ----------------------------------------------------------------------------


def _refuse_foreign(module: nn.Module, checkpoint: Checkpoint, unused: Iterable[str]) -> None:
    """Refuse tensors of layers the module has, or of further items of its lists.

    Whole parts the module lacks (a decoder, another head) are no mistake.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    ignored = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    foreign = []
    for name in unused:
        if _BOOKKEEPING.search(name) or any(p.search(name) for p in ignored):
            continue
        parts = name.split(".")
        known = max((i for i in range(len(parts)) if ".".join(parts[:i]) in modules and i), default=0)
        if known and (known == len(parts) - 1 or isinstance(modules[".".join(parts[:known])], nn.ModuleList)):
            foreign.append(name)
    if foreign:
        raise CheckpointError(
            f"{checkpoint.root}: holds {len(foreign)} tensors that {type(module).__name__} has no place for "
            f"({', '.join(foreign[:4])}); is the config that of this checkpoint?"
        )


def require_parameters(module: nn.Module) -> None:
    """Refuse a module that has nothing to stream."""
    if next(module.parameters(), None) is None:
        raise ModelError(f"{type(module).__name__} has no parameters: there is nothing to stream")
