"""Match a module's parameters and buffers with a checkpoint's tensors.

Names may differ by a wrapper's prefix and by what transformers renames, stacks and splits on loading
(`conversions`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.checkpoint.formats import TABLE
from blockstream.checkpoint.read.entries import ITEM_NBYTES
from blockstream.checkpoint.recognise import recognised
from blockstream.checkpoint.write.rounding import SCALE
from blockstream.errors import CheckpointError, ModelError
from blockstream.plugins.manager import Plugins

from .adapters import adapter_paths, refuse_empty
from .conversions import Source, library_match
from .dtypes import FLOATING, TO_TORCH
from .gguf_names import renamed
from .libraries import computed
from .original_keys import original_match

#: What torch.compile, sharding, checkpointing and adapters put inside the names of what they wrap.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
#: Tensors older files hold and newer modules compute: missing them in the module is no mistake.
_BOOKKEEPING = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked|relative_position_index|"
    r"attn\.bias|attention\.bias|rotary_emb\.(cos|sin)_cached)$"
)


@dataclass(frozen=True)
class Matched:
    """What a checkpoint holds for a module: sources by name; tied names share one source.

    Beside a matrix in int8 stands the source of its scales, NAME_scale. `unused` are tensors the module has
    no place for, `whole` the checkpoint's own entries by name.
    """

    sources: Mapping[str, Source]
    unused: tuple[str, ...]
    whole: Mapping[str, TensorEntry]
    #: Values of parameters that no file holds: the library computes them.
    computed: Mapping[str, Tensor] = field(default_factory=dict)


def match(module: nn.Module, checkpoint: Checkpoint, *, packing: bool = False) -> Matched:
    """Return the sources of a module's parameters and stored buffers.

    Formats of plugins are asked where those of the table do not fit. Raises CheckpointError naming what is
    missing, what the module has no place for although it has the layer, and, unless it is for `packing`, what
    cannot be read as it lies.
    """
    found, refusal = None, None
    try:
        found = _match(module, recognised(checkpoint, TABLE), packing)
    except CheckpointError as error:
        refusal = error
    if found is not None and not _unscaled(found):
        return found
    others = Plugins().weight_formats()
    if others:
        return _match(module, recognised(checkpoint, (*others, *TABLE)), packing)
    if found is None:
        assert refusal is not None
        raise refusal
    return found


def _unscaled(found: Matched) -> bool:
    """Return whether something is in int8 without the scales that the engine's own packs have."""
    return any(s.dtype == "I8" and name + SCALE not in found.sources for name, s in found.sources.items())


def _match(module: nn.Module, checkpoint: Checkpoint, packing: bool) -> Matched:
    checkpoint = renamed(module, checkpoint)
    kept = adapter_paths(module)
    refuse_empty(module, kept)
    groups = [group for group in _tied(module) if not kept.issuperset(group)]
    wanted = {name for group in groups for name in group} | set(_stored_buffers(module))
    unwrapped = _unwrapped(checkpoint, wanted)
    found = library_match(module, unwrapped, wanted) or {}
    if not _covers(found, groups):
        plain = _prefix_match(unwrapped, wanted)
        if len(plain) > len(found):
            found = plain
        if not _covers(found, groups) and (original := original_match(module, checkpoint, wanted)):
            found = original if len(original) > len(found) else found
    sources: dict[str, Source] = {}
    missing: list[str] = []
    values: dict[str, Tensor] = {}
    for group in groups:
        source = next((found[name] for name in group if name in found), None)
        if source is None and (value := computed(module, group[0])) is not None:
            values.update(dict.fromkeys(group, value))
        elif source is None:
            missing.append(group[0])
        else:
            sources.update(dict.fromkeys(group, source))
    for name in missing:
        if name in checkpoint.absent:
            checkpoint[name]  # says where the index places it
    if missing:
        packed = next((n for n in checkpoint.entries if n.endswith(".qweight")), None)
        raise CheckpointError(
            f"{checkpoint.root}: has no tensor for {len(missing)} of {len(groups)} parameters of "
            f"{type(module).__name__} ({', '.join(missing[:4])}); it holds {len(checkpoint)}, such as "
            + (
                f"{', '.join(checkpoint.names[:2])}: is this the checkpoint of another model?"
                if packed is None
                else f"{packed}, as GPTQ and AWQ write, which are not read; name the original checkpoint, or "
                "write it dequantised with the library that quantised it"
            )
        )
    _refuse_dtypes(module, checkpoint, sources)
    sources.update({name: found[name] for name in _stored_buffers(module) if name in found})
    if not packing:
        _refuse_made(checkpoint, sources)
    scales = checkpoint.scales
    for name in list(sources) if scales else ():
        if (scale := sources[name].tensors[0].name + SCALE) in scales:
            found[name + SCALE] = sources[name + SCALE] = Source((checkpoint[scale],))
    used = {t.name for s in found.values() for t in (s.made.inputs if s.made else s.tensors)}
    # In a pack the second name of a tied tensor stands for the entry of the first.
    unused = tuple(n for n in checkpoint.names if n not in used and checkpoint[n].name not in used)
    _refuse_foreign(module, checkpoint, unused)
    return Matched(sources, unused, checkpoint.entries, values)


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


def _unwrapped(checkpoint: Checkpoint, wanted: set[str]) -> Checkpoint:
    """Return the checkpoint with names as the module has them where a wrapper named itself inside them."""
    plain = {_WRAPPER.sub("", name): name for name in wanted}
    if checkpoint.entries.keys() >= wanted or not any(
        _WRAPPER.search(name) for name in (*checkpoint.entries, *wanted)
    ):
        return checkpoint
    bare = {name: _WRAPPER.sub("", name) for name in checkpoint.entries}
    entries = {plain.get(bare[n], bare[n]): entry for n, entry in checkpoint.entries.items()}
    return replace(checkpoint, entries=entries)


def _prefix_match(checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Source]:
    """Return the match under the one prefix, to strip or to add, that fits the most names."""
    scales = checkpoint.scales
    names = {n: e for n, e in checkpoint.entries.items() if n not in scales}
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


def _refuse_dtypes(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
    """Refuse tensors that are no weights: integers, booleans, complex numbers in the place of others."""
    for name, param in module.named_parameters(remove_duplicate=False):
        if name not in sources:
            continue
        dtype = sources[name].dtype
        if dtype not in ITEM_NBYTES and sources[name].tensors[0].coded is None:
            raise CheckpointError(
                f"{checkpoint.root}: {sources[name].tensors[0].name!r} is in the format {dtype}, which is "
                f"not read (read are {', '.join(f.name for f in TABLE)}); use a file in one of those, or the "
                "original checkpoint"
            )
        floating = dtype in FLOATING or dtype == "I8" or sources[name].tensors[0].coded is not None
        if not (floating if param.is_floating_point() else TO_TORCH.get(dtype) is param.dtype):
            raise CheckpointError(
                f"{checkpoint.root}: {sources[name].tensors[0].name!r} is {dtype} and parameter {name!r} of "
                f"{type(module).__name__} is {str(param.dtype).removeprefix('torch.')}; is this "
                "the checkpoint of another model, or quantised in a way its config.json does not say?"
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
        if _BOOKKEEPING.search(name) or name.endswith("_extra_state") or any(p.search(name) for p in ignored):
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


def _refuse_made(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
    """Refuse parameters that only arithmetic makes of what the files hold."""
    made = [s.made for s in sources.values() if s.made is not None]
    if made:
        raise CheckpointError(
            f"{checkpoint.root}: arithmetic makes {len(made)} parameters, such as {made[0].path!r} from "
            f"{made[0].inputs[0].name!r} by {made[0].operations}, and cannot be read as they lie; write the "
            f"checkpoint once with `blockstream pack {checkpoint.root} DST` and use that"
        )


def require_parameters(module: nn.Module) -> None:
    """Refuse a module that has nothing to stream."""
    if next(module.parameters(), None) is None:
        raise ModelError(f"{type(module).__name__} has no parameters: there is nothing to stream")
