"""What an attention transform is asked and what it answers.

It is resolved once a run for each `AttentionLayer`; what depends on the step reads it from `current_run()`
when the layer computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

AttentionKind = Literal["spatial", "temporal", "cross", "full"]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer as a transform sees it, shapes of this run included.

    `grid` (T, H, W) are the tokens of the video, in this order: frames, rows, columns. `kind` says what
    attends to what: "spatial", the tokens of a frame to each other; "temporal", those of a place; "full",
    all of the grid and its text; "cross", the grid to the text. `leading` and `trailing` text tokens stand
    before and behind the grid; the keys of "cross" are the trailing ones, alone. Called with q, k, v, a
    kernel is told of those that are there, without padding; asked beforehand, of the most there can be.
    `width` channels are split over `heads`.

    `name` is the module's path in its model; `index` says which of the model's `layers` of this kind it is,
    in the order of a pass. `merged`: the grid is what a `Merge` leaves.
    """

    name: str
    kind: AttentionKind
    grid: tuple[int, int, int]
    width: int
    heads: int
    leading: int = 0
    trailing: int = 0
    index: int = 0
    layers: int = 1
    merged: bool = False

    @property
    def T(self) -> int:  # noqa: N802
        """Return the frames."""
        return self.grid[0]

    @property
    def S(self) -> int:  # noqa: N802
        """Return the tokens a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def text_tokens(self) -> int:
        """Return the text tokens on both sides."""
        return self.leading + self.trailing

    @property
    def pairs(self) -> int:
        """Return the pairs of query and key of one sample and head."""
        tokens = self.T * self.S
        if self.kind == "cross":
            return tokens * self.text_tokens
        if self.kind == "full":
            return (tokens + self.text_tokens) ** 2
        return tokens * (self.S if self.kind == "spatial" else self.T)


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Merge:
    """A pair that shortens what a layer attends to and restores its length.

    `merge` maps [B, T, S, C] to [B, T', S, C], `unmerge` maps the layer's result back to
    [B, T, S, C]; `positions` [T'] are the merged tokens' frame indices for rotary embeddings.
    `active` is asked when the layer computes; while False the layer runs as if there were no merge.
    """

    merge: Callable[[Tensor], Tensor]
    unmerge: Callable[[Tensor], Tensor]
    positions: Tensor
    active: Callable[[], bool] = _always


#: fn(q, k, v, layout) -> [B, heads, N, D]; q, k, v are [B, heads, N, D] in the order of tokens that layout,
#: the AttentionLayer of this call, states, padding left out. A "spatial" or "temporal" layer's B counts
#: frames or places too. A kernel that computes part of the pairs has a method `density()`: their share at
#: the step of `current_run()`, by which plans and reports go.
AttentionKernel = Callable[["Tensor", "Tensor", "Tensor", AttentionLayer], "Tensor"]
