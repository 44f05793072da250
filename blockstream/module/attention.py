"""The seam where attention transforms act: resolved once a run for each layer, checked wherever it is used.

A model's attention layer holds a `Seam`, `UNCHANGED` for most of the time, and computes through it:

    q, k, v = ...                               # [B, heads, N, D], in the order of tokens the layer states
    kernel = self.seam.kernel
    y = attention(q, k, v) if kernel is None else kernel(q, k, v, valid)

A pipeline resolves the run's transforms for the length of a block: `with attention_hooks(pairs, ...)`, where
each pair is what holds a `seam` and the `AttentionLayer` it is for. What a plugin returns wrongly is blamed
on it.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from blockstream.errors import ModelError, PluginError
from blockstream.plugins.transforms import AttentionKernel, AttentionLayer, Merge


class HasSeam(Protocol):
    """What computes one attention layer: a module, or the processor of one."""

    seam: Seam


class Kernel:
    """A plugin's kernel for one layer, given real tokens only, its results checked.

    Padding of the text never reaches a plugin: it is cut off beforehand, sample by sample where they differ,
    and the layer that is handed over says how many text tokens are left. So a kernel needs no mask.
    """

    def __init__(self, function: AttentionKernel, layer: AttentionLayer) -> None:
        self.layer = layer
        self._function = function
        self._who = getattr(function, "who", "an attention kernel")
        self._unseen = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Return the attention of q, k, v [B, heads, N, D], in the layer's order of tokens.

        `valid` says how many of each sample's text tokens are real, from the first on; None: all. Rows of
        padding come back as zeros. Raises PluginError, naming the plugin, for a result of another shape or
        dtype, and, the first time, for one that is not finite where its inputs are.
        """
        layer = self.layer
        if layer.leading and layer.trailing and valid is None:
            return self._checked(q, k, v, layer)
        if not layer.text_tokens:
            return self._checked(q, k, v, layer)
        passed = k.shape[2] - (0 if layer.kind == "cross" else layer.T * layer.S)
        if valid is None or set(valid) == {passed}:
            return self._checked(q, k, v, _with_text(layer, passed))
        if layer.leading and layer.trailing:
            raise ModelError(f"{layer.name}: text on both sides of the grid cannot be padded")
        if len(valid) != len(q) or not all(0 <= n <= passed for n in valid):
            raise ModelError(
                f"{layer.name}: {list(valid)} text tokens are said to be real, of {passed} in {len(q)} "
                "samples"
            )
        if len(set(valid)) == 1:
            return self._cut(q, k, v, valid[0], passed)
        one = [slice(i, i + 1) for i in range(len(q))]
        return torch.cat([self._cut(q[i], k[i], v[i], n, passed) for i, n in zip(one, valid, strict=True)])

    def _cut(self, q: Tensor, k: Tensor, v: Tensor, real: int, passed: int) -> Tensor:
        """Return the attention of samples with `real` text tokens each, of those passed."""
        layer = _with_text(self.layer, real)
        if layer.kind == "cross":
            return self._checked(q, k[:, :, :real], v[:, :, :real], layer)
        if not self.layer.leading:
            stay = q.shape[2] - passed + real
            y = self._checked(q[:, :, :stay], k[:, :, :stay], v[:, :, :stay], layer)
            return torch.cat((y, y.new_zeros(*y.shape[:2], passed - real, y.shape[3])), 2)
        q, k, v = (torch.cat((x[:, :, :real], x[:, :, passed:]), 2) for x in (q, k, v))
        y = self._checked(q, k, v, layer)
        nothing = y.new_zeros(*y.shape[:2], passed - real, y.shape[3])
        return torch.cat((y[:, :, :real], nothing, y[:, :, real:]), 2)

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        y = self._function(q, k, v, layer)
        want = (q.shape, q.dtype)
        if not isinstance(y, Tensor) or (y.shape, y.dtype) != want:
            raise PluginError(f"{self._who}: returned {_shown(y)} for {layer.name}, expected {_shown(q)}")
        if self._unseen and not isinstance(y, FakeTensor) and not y.is_meta:
            self._unseen = False
            if not y.isfinite().all() and all(x.isfinite().all() for x in (q, k, v)):
                raise PluginError(
                    f"{self._who}: returned NaN or infinity for {layer.name}, from finite inputs"
                )
        return y


@dataclass(frozen=True, slots=True)
class Seam:
    """What one layer was resolved to: its kernel, and a merge with the kernel of the merged layer."""

    layer: AttentionLayer | None = None
    kernel: Kernel | None = None
    merge: Merge | None = None
    merged_kernel: Kernel | None = None

    def merging(self) -> Merge | None:
        """Return the merge where there is one and it is active at this step."""
        return self.merge if self.merge is not None and self.merge.active() else None

    def around(self, x: Tensor, attend: Callable[[Tensor, Kernel | None], Tensor]) -> Tensor:
        """Return `attend(x, kernel)` of x [B, T, S, C], on merged tokens while a merge is active.

        Raises ModelError for tokens that the layer was not resolved for.
        """
        if (layer := self.layer) is not None and x.shape[1:3] != (layer.T, layer.S):
            raise ModelError(
                f"{layer.name} was resolved for {layer.T} frames of {layer.S} tokens, "
                f"not {x.shape[1]} of {x.shape[2]}; resolve the hooks for this shape"
            )
        merge = self.merging()
        if merge is None:
            return attend(x, self.kernel)
        return merge.unmerge(attend(merge.merge(x), self.merged_kernel))


UNCHANGED = Seam()


@contextmanager
def attention_hooks(
    pairs: Iterable[tuple[HasSeam, AttentionLayer]],
    *,
    token_merge: Callable[[AttentionLayer], Merge | None] | None = None,
    attention_kernel: Callable[[AttentionLayer], AttentionKernel | None] | None = None,
) -> Iterator[list[AttentionLayer]]:
    """Resolve the attention transforms of a run on some layers, and clear them when the block ends.

    Each hook is called once a layer; where a merge applies, `attention_kernel` is asked for the merged layer
    too. Yields the layers that a transform changed. Raises PluginError, naming the plugin, for a merge whose
    positions are not as many as frames can become.
    """
    changed = []
    pairs = list(pairs)
    try:
        for holder, layer in pairs:
            kernel = attention_kernel(layer) if attention_kernel else None
            merge = token_merge(layer) if token_merge else None
            if kernel is None and merge is None:
                continue
            merged_kernel = None
            if merge is not None:
                merge = _checked_merge(merge, layer)
                shorter = merged_layer(layer, merge)
                found = attention_kernel(shorter) if attention_kernel else None
                merged_kernel = Kernel(found, shorter) if found is not None else None
            holder.seam = Seam(layer, Kernel(kernel, layer) if kernel else None, merge, merged_kernel)
            changed.append(layer)
        yield changed
    finally:
        for holder, _ in pairs:
            holder.seam = UNCHANGED


def merged_layer(layer: AttentionLayer, merge: Merge) -> AttentionLayer:
    """Return a layer as it is while its tokens are merged."""
    return replace(layer, grid=(len(merge.positions), *layer.grid[1:]), merged=True)


def numbered(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Return layers, in the order of a pass, with `index` and `layers` set, each kind counted by itself."""
    of, so_far = Counter(layer.kind for layer in layers), Counter[str]()
    found = []
    for layer in layers:
        found.append(replace(layer, index=so_far[layer.kind], layers=of[layer.kind]))
        so_far[layer.kind] += 1
    return found


def _with_text(layer: AttentionLayer, tokens: int) -> AttentionLayer:
    """Return a layer with `tokens` of text on the side where it has any."""
    return replace(layer, leading=tokens) if layer.leading else replace(layer, trailing=tokens)


def _checked_merge(merge: Merge, layer: AttentionLayer) -> Merge:
    """Return a merge whose results are checked, the shapes it has to have being known."""
    who, places = getattr(merge.merge, "who", "a token merge"), merge.positions
    if not isinstance(places, Tensor) or places.dim() != 1 or not 1 <= len(places) <= layer.T:
        raise PluginError(
            f"{who}: positions {_shown(places)} for {layer.name}; expected a tensor of one position for each "
            f"merged frame, from 1 to {layer.T}"
        )

    def checked(function: Callable[[Tensor], Tensor], takes: int, gives: int) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            y = function(x)
            want = (x.shape[0], gives, *x.shape[2:])
            if not isinstance(y, Tensor) or y.shape != want or y.dtype != x.dtype:
                raise PluginError(
                    f"{getattr(function, 'who', who)}: returned {_shown(y)} for {layer.name}, of {takes} "
                    f"frames; expected {list(want)} {_name(x.dtype)}"
                )
            return y

        return call

    return replace(
        merge,
        merge=checked(merge.merge, layer.T, len(places)),
        unmerge=checked(merge.unmerge, len(places), layer.T),
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {_name(value.dtype)}"
    return reprlib.repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
