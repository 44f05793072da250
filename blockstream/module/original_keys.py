"""Single files with the keys of a model's own authors, read as diffusers reads them (`from_single_file`).

diffusers' converter for the class is run on tensors that hold no numbers and remember where their bytes lie.
What it only renames, cuts along the first dimension or joins is read in place; what it computes is named.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from blockstream.checkpoint import Checkpoint, TensorEntry
from blockstream.errors import CheckpointError

from .conversions import Source
from .dtypes import TO_TORCH
from .libraries import library_of

_aten = torch.ops.aten
CPU = torch.device("cpu")
#: What changes no byte, and their order only where the result would not be contiguous.
_SAME = {
    _aten.alias, _aten.detach, _aten.clone, _aten.view, _aten._unsafe_view, _aten.unsqueeze, _aten.squeeze,
    _aten.lift_fresh, _aten.reshape, _aten._to_copy, _aten.select, _aten.slice,
}  # fmt: skip


class Piece(NamedTuple):
    """Some elements of a tensor of a file, contiguous: `size` of them from `begin`."""

    entry: TensorEntry
    begin: int
    size: int


class Traced(torch.Tensor):
    """A tensor without numbers, of the bytes in `pieces`; None where the operation `by` computes it."""

    pieces: tuple[Piece, ...] | None
    by: str

    @classmethod
    def of(cls, like: torch.Tensor, pieces: tuple[Piece, ...] | None, by: str = "") -> Any:
        """Return one of the shape and dtype of another tensor."""
        made: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(like.shape), dtype=like.dtype, device=CPU)
        made.pieces, made.by = pieces, by
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Return what an operation makes, and of which bytes."""
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "device"}

        def bare(x: Traced) -> torch.Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device="meta")

        plain_args, plain_kwargs = tree_map_only(Traced, bare, (args, kwargs))
        shown = func(*plain_args, **plain_kwargs)
        op, name = func.overloadpacket, func.overloadpacket.__name__
        if isinstance(shown, torch.Tensor):
            return cls.of(shown, _pieces_of(op, args, kwargs, shown), name)
        if op in (_aten.split, _aten.split_with_sizes, _aten.unbind, _aten.chunk):
            return [
                cls.of(x, pieces, name) for x, pieces in zip(shown, _split(args, kwargs, shown), strict=True)
            ]
        return tree_map_only(torch.Tensor, lambda x: cls.of(x, None, name), shown)


def _pieces_of(op: Any, args: Any, kwargs: Any, shown: torch.Tensor) -> tuple[Piece, ...] | None:
    """Return the bytes that an operation's result is made of; None where it computes."""
    first = args[0]
    if op is _aten.cat:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        whole = all(isinstance(x, Traced) and x.pieces is not None for x in first)
        if not whole or prod(shown.shape[: dim % shown.dim()]) != 1:
            return None
        return tuple(piece for x in first for piece in x.pieces)
    if not isinstance(first, Traced) or first.pieces is None or op not in _SAME or shown.dtype != first.dtype:
        return None
    if shown.numel() == first.numel():
        return first.pieces
    if op is _aten.slice:
        given: tuple[Any, ...] = (*args[1:], *(0, 0, None, 1)[len(args) - 1 :])
        dim = int(given[0]) % first.dim()
        if given[3] != 1 or prod(first.shape[:dim]) != 1:
            return None
        begin = range(first.shape[dim])[slice(given[1], None)].start
        return _cut(first.pieces, begin * prod(first.shape[dim + 1 :]), shown.numel())
    if op is _aten.select and prod(first.shape[: args[1] % first.dim()]) == 1:
        dim = args[1] % first.dim()
        return _cut(first.pieces, (args[2] % first.shape[dim]) * shown.numel(), shown.numel())
    return None


def _split(args: Any, kwargs: Any, shown: Sequence[torch.Tensor]) -> list[tuple[Piece, ...] | None]:
    first = args[0]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % first.dim()
    found: list[tuple[Piece, ...] | None] = []
    at = 0
    for part in shown:
        fits = first.pieces is not None and prod(first.shape[:dim]) == 1
        found.append(_cut(first.pieces, at, part.numel()) if fits else None)
        at += part.numel()
    return found


def _cut(pieces: tuple[Piece, ...], begin: int, count: int) -> tuple[Piece, ...]:
    """Return some of the elements of several pieces, in order."""
    found, at = [], 0
    for piece in pieces:
        start, stop = max(begin, at), min(begin + count, at + piece.size)
        if start < stop:
            found.append(Piece(piece.entry, piece.begin + start - at, stop - start))
        at += piece.size
    return tuple(found)


def original_match(module: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> dict[str, Source] | None:
    """Return the sources of a module's tensors in a file of its authors' keys; None where it is none.

    Raises CheckpointError naming what the converter computes, and how to write that once.
    """
    convert = _converter(module)
    if convert is None:
        return None
    traced = {name: _traced(entry) for name, entry in checkpoint.entries.items()}
    try:
        made: Mapping[str, Any] = convert(dict(traced))
    except Exception:  # a file that is not what the converter is for fails in it, anyhow
        return None
    shapes = {name: tuple(t.shape) for name, t in module.state_dict(keep_vars=True).items()}
    found: dict[str, Source] = {}
    computed: list[tuple[str, str]] = []
    for name in wanted & made.keys():
        value = made[name]
        source = _source(value, shapes[name]) if isinstance(value, Traced) and name in shapes else None
        if source is None:
            computed.append((name, getattr(value, "by", "") or "arithmetic"))
        else:
            found[name] = source
    if computed and len(computed) + len(found) >= len(wanted) // 2:
        name, by = min(computed)
        cls = type(module).__name__
        raise CheckpointError(
            f"{checkpoint.root}: diffusers computes {len(computed)} parameters of {cls} from it, such as "
            f"{name!r} by {by}, and they cannot be read as they lie; write it once with "
            f"diffusers.{cls}.from_single_file(FILE).save_pretrained(FOLDER) and stream that"
        )
    return found


def _converter(module: nn.Module) -> Callable[[dict[str, Any]], Mapping[str, Any]] | None:
    """Return what diffusers converts files for a class with; None where it has nothing."""
    if library_of(module) != "diffusers":
        return None
    try:
        loaders = importlib.import_module("diffusers.loaders.single_file_model")
        table, which = loaders.SINGLE_FILE_LOADABLE_CLASSES, loaders._get_single_file_loadable_mapping_class
    except (ImportError, AttributeError):  # another version, whose converters are elsewhere
        return None
    name = which(type(module))
    if name is None:
        return None
    function = table[name]["checkpoint_mapping_fn"]
    taken = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    config: Any = getattr(module, "config", None)
    settings = {"config": dict(config)} if "config" in taken or takes_any else {}
    return lambda held: function(checkpoint=held, **settings)


def _traced(entry: TensorEntry) -> Any:
    dtype = torch.uint8 if entry.coded is not None else TO_TORCH.get(entry.dtype, torch.uint8)
    like = torch.empty(entry.shape, dtype=dtype, device="meta")
    return Traced.of(like, (Piece(entry, 0, prod(entry.shape)),))


def _source(value: Traced, shape: tuple[int, ...]) -> Source | None:
    """Return the source of a traced tensor for a parameter of a shape; None where it is computed."""
    if value.pieces is None or tuple(value.shape) != shape or not value.pieces:
        return None
    if len(value.pieces) == 1:
        entry = _part(value.pieces[0], shape)
        return None if entry is None else Source((entry,))
    row = prod(shape[1:])
    entries = [
        _part(piece, (piece.size // row, *shape[1:])) if piece.size % row == 0 else None
        for piece in value.pieces
    ]
    return None if None in entries else Source(tuple(e for e in entries if e is not None))


def _part(piece: Piece, shape: tuple[int, ...]) -> TensorEntry | None:
    """Return a piece as an entry of its own; None where a coded tensor cannot be cut so."""
    whole, count = piece.entry, prod(piece.entry.shape)
    if piece.size == count:
        return whole if whole.shape == shape else replace(whole, shape=shape) if whole.coded is None else None
    if whole.coded is not None and (whole.coded.beside or piece.begin % whole.shape[-1]):
        return None
    begin, nbytes = (whole.nbytes * n / count for n in (piece.begin, piece.size))
    if begin % 1 or nbytes % 1:
        return None
    return replace(whole, shape=shape, offset=whole.offset + int(begin), nbytes=int(nbytes))
