"""Operations that move, cut and join numbers without computing on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from blockstream.errors import ModelError

from .table import Flag, Flags, Int, Ints, Number, Tensors, Text, operator


@operator("reshape", moves=True)
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """Return x in another shape: -1 is what is left, 0 the size x has there, counted from the last axis."""
    return x.reshape([x.shape[i - len(shape)] if n == 0 else n for i, n in enumerate(shape)])


@operator("transpose", moves=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    """Return x with its axes in another order."""
    return x.permute(perm)


@operator("squeeze", moves=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Return x without axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(axes)


@operator("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """Return x with axes of size 1 where `axes` are in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("concat", moves=True)
def concat(values: Tensors, axis: Int, interleave: Flag = False) -> Tensor:
    """Return the values joined along an axis; single numbers make a list."""
    values = tuple(v.reshape(1) if v.dim() == 0 else v for v in values)
    if interleave:
        return torch.stack(values, axis % values[0].dim() + 1).flatten(
            axis % values[0].dim(), axis % values[0].dim() + 1
        )
    return torch.cat(values, axis)


@operator("stack", moves=True)
def stack(values: Tensors, axis: Int) -> Tensor:
    """Return the values along a new axis."""
    return torch.stack(values, axis)


@operator("split", moves=True)
def split(
    x: Tensor, axis: Int, num_splits: Int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    """Return the pieces of x along an axis."""
    if split_sizes is None and num_splits is None:
        raise ModelError("split has neither num_splits nor split_sizes")
    sizes = split_sizes if split_sizes is not None else x.shape[axis] // (num_splits or 1)
    return tuple(torch.split(x, sizes, axis))


@operator("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Flags | None = None,
    end_mask: Flags | None = None,
    squeeze_mask: Flags | None = None,
) -> Tensor:
    """Return a part of x: masked ends are open, squeezed axes take one place; negative strides go back."""
    n = len(begin)
    stride = stride or [1] * n
    begin_mask, end_mask = begin_mask or [False] * n, end_mask or [False] * n
    squeezed = squeeze_mask or [False] * n
    for axis in range(n):
        step, size = stride[axis], x.shape[axis]
        if squeezed[axis]:
            x = x.narrow(axis, begin[axis] % size, 1)
            continue
        places = range(size)[
            slice(None if begin_mask[axis] else begin[axis], None if end_mask[axis] else end[axis], step)
        ]
        if step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, places.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x.squeeze([axis for axis in range(n) if squeezed[axis]]) if any(squeezed) else x


@operator("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """Return a part of x from `begin`, `size` long; -1 goes to the end."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@operator("tile", moves=True)
def tile(x: Tensor, reps: Ints) -> Tensor:
    """Return x repeated along each axis."""
    return x.repeat(reps)


@operator("shape", moves=True)
def shape(x: Tensor) -> Tensor:
    """Return the shape of x."""
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("fill", moves=True)
def fill(shape: Ints, value: Tensor) -> Tensor:
    """Return a tensor of one value."""
    return value.reshape(()).expand(shape).clone()


@operator("range_1d", moves=True)
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """Return the numbers from start to before end."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)


@operator("gather", moves=True)
def gather(
    x: Tensor, indices: Tensor, axis: Int = 0, batch_dims: Int = 0, validate_indices: Flag = False
) -> Tensor:
    """Return the places of x along an axis; negative indices count from the end."""
    axis %= x.dim()
    rows = indices.long()
    rows = torch.where(rows < 0, rows + x.shape[axis], rows)
    if batch_dims == 0:
        found = x.index_select(axis, rows.reshape(-1))
        return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    if batch_dims < 0 or batch_dims > axis:
        raise ModelError(f"gather with batch_dims {batch_dims} along axis {axis} is not evaluated")
    lead, inner = x.shape[:batch_dims], axis - batch_dims
    pairs = zip(x.flatten(0, batch_dims - 1), rows.flatten(0, batch_dims - 1), strict=True)
    parts = [
        part.index_select(inner, row.reshape(-1)).reshape(
            *part.shape[:inner], *row.shape, *part.shape[inner + 1 :]
        )
        for part, row in pairs
    ]
    return torch.unflatten(torch.stack(parts), 0, lead)


@operator("gather_along_axis", moves=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: Int = 0, validate_indices: Flag = False) -> Tensor:
    """Return, at each place, the number of x that the index there names along an axis."""
    rows = indices.long()
    return x.gather(axis, torch.where(rows < 0, rows + x.shape[axis], rows))


@operator("one_hot", moves=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: Int,
    axis: Int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """Return `on_value` where an index points along a new axis, `off_value` elsewhere."""
    axis %= indices.dim() + 1
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros_like(on) if off_value is None else off_value
    places = torch.arange(one_hot_vector_size).reshape([-1] + [1] * (indices.dim() - axis))
    return torch.where(indices.long().unsqueeze(axis) == places, on, off)


@operator("band_part", moves=True)
def band_part(x: Tensor, lower: Int = -1, upper: Int = -1) -> Tensor:
    """Return x with zeros outside a band around the diagonal of the last two axes; -1 keeps a side."""
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    keep = torch.ones(x.shape[-2:], dtype=torch.bool)
    keep = keep & (rows - columns <= lower) if lower >= 0 else keep
    keep = keep & (columns - rows <= upper) if upper >= 0 else keep
    return torch.where(keep, x, torch.zeros_like(x))


@operator("reverse", moves=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Return x backwards along axes."""
    return x.flip(list(range(x.dim())) if axes is None else axes)


@operator("pad", moves=True)
def pad(x: Tensor, pad: Ints, mode: Text = "constant", constant_val: Number = 0.0) -> Tensor:
    """Return x with places added before and behind its last axes: (before, behind) of each, in order."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    around = [n for pair in reversed(pairs) for n in pair]
    if mode == "constant":
        return functional.pad(x, around, value=constant_val if x.is_floating_point() else int(constant_val))
    if mode not in ("reflect", "replicate"):
        raise ModelError(f"pad has no mode {mode!r}; it has constant, reflect and replicate")
    for i, (before, behind) in enumerate(pairs):
        axis = x.dim() - len(pairs) + i
        places = torch.arange(-before, x.shape[axis] + behind)
        last = x.shape[axis] - 1
        places = places.clamp(0, last) if mode == "replicate" else last - (last - places.abs()).abs()
        x = x.index_select(axis, places)
    return x
