"""Sliding tile attention by torch's flex_attention: one compiled kernel that skips blocks of keys.

Tokens are brought to tile order, where a window is whole blocks; only blocks with padding in them are
masked. The first call compiles, for seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blockstream.errors import ModelError

from .tiles import Tiling, Window

#: Tokens of a block, the largest that divides a tile.
BLOCKS = (128, 64, 32, 16)


def block_of(tiling: Tiling) -> int | None:
    """Return the tokens of a block, None where no size the kernel takes divides a tile."""
    return next((size for size in BLOCKS if prod(tiling.tile) % size == 0), None)


def usable(device: torch.device, tiling: Tiling) -> bool:
    """Return whether to compute by it unasked: on a CUDA device with a compiler, in usual blocks."""
    return device.type == "cuda" and find_spec("triton") is not None and block_of(tiling) == BLOCKS[0]


class Flex:
    """Attends by flex_attention over one canvas. What does not change from call to call is kept."""

    def __init__(self, tiling: Tiling) -> None:
        block = block_of(tiling)
        if block is None:
            raise ModelError(
                f"kernel: flex takes tiles of a multiple of {BLOCKS[-1]} tokens; {tiling.tile} has "
                f"{prod(tiling.tile)}. Write another tile, or kernel: gathered"
            )
        self.tiling, self.block = tiling, block
        self._masks: dict[tuple[Window, int, torch.device], tuple[Tensor, ...]] = {}
        self._orders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window], text: int) -> Tensor:
        """Return softmax(q k^T / sqrt(D)) v: see `gathered.attend`, which it equals up to rounding."""
        video, device = q.shape[2] - text, q.device
        places, real = self._order(device)
        behind = -(-text // prod(self.tiling.tile)) * prod(self.tiling.tile)

        def tiled(x: Tensor) -> Tensor:
            words = torch.nn.functional.pad(x[:, :, video:], (0, 0, 0, behind - text))
            return torch.cat((x[:, :, places], words), 2)

        keep = torch.cat((real, torch.arange(behind, device=device) < text))
        out = _compiled()(tiled(q), tiled(k), tiled(v), block_mask=self._mask(windows, keep, behind, text))
        back = torch.empty_like(q, memory_format=torch.contiguous_format)
        back[:, :, places[real]] = out[:, :, : len(real)][:, :, real]
        back[:, :, video:] = out[:, :, len(real) : len(real) + text]
        return back

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the token at each place of the tile order, and which places hold one: others are padding."""
        if device not in self._orders:
            tiling = self.tiling
            padded = Tiling(
                tuple(n * size for n, size in zip(tiling.tiles, tiling.tile, strict=True)),  # type: ignore[arg-type]
                tiling.tile,
            )
            grid = [torch.arange(n) for n in padded.canvas]
            t, h, w = (
                x.reshape(-1)[torch.tensor(padded.order())] for x in torch.meshgrid(*grid, indexing="ij")
            )
            T, H, W = tiling.canvas
            real = (t < T) & (h < H) & (w < W)
            places = ((t * H + h) * W + w).where(real, torch.tensor(0))
            self._orders[device] = places.to(device), real.to(device)
        return self._orders[device]

    def _mask(self, windows: Sequence[Window], keep: Tensor, behind: int, text: int) -> BlockMask:
        """Return the blocks that each head computes: whole ones, and those in which padding is masked."""
        parts = [self._blocks(window, keep, behind, text) for window in windows]
        some, some_at, whole, whole_at = (torch.stack(part)[None] for part in zip(*parts, strict=True))

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return keep[kv]

        more: dict[str, Any] = {}
        if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters:
            more["compute_q_blocks"] = False  # only a backward pass reads them
        return BlockMask.from_kv_blocks(
            some, some_at, whole, whole_at, BLOCK_SIZE=self.block, mask_mod=mask_mod, **more
        )

    def _blocks(self, window: Window, keep: Tensor, behind: int, text: int) -> tuple[Tensor, ...]:
        """Return, for each block of queries, how many blocks of keys it sees and which, masked and whole."""
        key = (window, text, keep.device)
        if key not in self._masks:
            tiling, per_tile = self.tiling, prod(self.tiling.tile) // self.block
            tiles = prod(tiling.tiles)
            seen = torch.zeros(tiles, *tiling.tiles, dtype=torch.bool)
            for n, tile in enumerate(product(*map(range, tiling.tiles))):
                box = tiling.seen(window, tile)
                t, h, w = (
                    slice(low // s, -(-high // s)) for (low, high), s in zip(box, tiling.tile, strict=True)
                )
                seen[n, t, h, w] = True
            blocks = seen.flatten(1).repeat_interleave(per_tile, 0).repeat_interleave(per_tile, 1)
            blocks = torch.nn.functional.pad(
                blocks, (0, behind // self.block, 0, behind // self.block), value=True
            )
            held = keep.cpu().unflatten(0, (-1, self.block))
            some, whole = blocks & held.any(1) & ~held.all(1), blocks & held.all(1)
            self._masks[key] = tuple(x.to(keep.device) for part in (some, whole) for x in _listed(part))
        return self._masks[key]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of each row are True [rows], and which, those first [rows, columns]."""
    at = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), at.to(torch.int32)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
