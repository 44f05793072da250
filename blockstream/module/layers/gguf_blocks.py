"""Widen the blocks of GGUF: a scale or two in float16 and small integers, as ggml's formats define them.

Everything is computed in float32 and rounded to the weight's dtype once, some blocks at a time; the numbers
are those of `gguf.quants.dequantize`, bit for bit. `about` may say what the library makes of the numbers:
`heads` (rows of a query or key put back in the order of its halves), `add` (to each), `transposed`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockstream.module.chunks import chunks
from blockstream.module.narrow import Stored

#: Elements widened at a time.
STEP = 1 << 20


def _widened(stored: Stored, block: int, nbytes: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the weight; `values` are float32 [n, block] of blocks uint8 [n, nbytes]."""
    about, blocks = stored.about, stored.raw.view(-1, nbytes)
    add, heads = about.get("add"), about.get("heads")
    made = torch.empty(len(blocks), block, dtype=stored.dtype, device=blocks.device)
    for some in chunks(len(blocks), max(STEP // block, 1)):
        numbers = values(blocks[some])
        made[some] = numbers if add is None else numbers + add
    if about.get("transposed"):
        return made.view(
            stored.shape[::-1]
        ).t()  # strided, as in the library: products differ in the last bit
    if heads:
        halves = made.view(heads, stored.shape[0] // heads // 2, 2, -1)
        return halves.transpose(1, 2).reshape(stored.shape)
    return made.view(stored.shape)


def f32(stored: Stored) -> Tensor:
    """Bring plain numbers, which the library computes on, to what it makes of them."""
    return _widened(stored, 1, 4, lambda b: b.contiguous().view(torch.float32))


def f16(stored: Stored) -> Tensor:
    """Bring plain numbers, which the library computes on, to what it makes of them."""
    return _widened(stored, 1, 2, lambda b: b.contiguous().view(torch.float16).float())


def bf16(stored: Stored) -> Tensor:
    """Bring plain numbers, which the library computes on, to what it makes of them."""
    return _widened(stored, 1, 2, lambda b: b.contiguous().view(torch.bfloat16).float())


def q4_0(stored: Stored) -> Tensor:
    """Widen blocks of 32: a scale, 4 bits each, less 8."""
    return _widened(stored, 32, 18, lambda b: _half(b, 0) * (_nibbles(b[:, 2:], 16) - 8))


def q4_1(stored: Stored) -> Tensor:
    """Widen blocks of 32: a scale, a least value, 4 bits each."""
    return _widened(stored, 32, 20, lambda b: (_half(b, 0) * _nibbles(b[:, 4:], 16)) + _half(b, 2))


def q5_0(stored: Stored) -> Tensor:
    """Widen blocks of 32: a scale, 5 bits each, less 16."""
    return _widened(stored, 32, 22, lambda b: _half(b, 0) * (_five(b[:, 2:6], b[:, 6:]) - 16))


def q5_1(stored: Stored) -> Tensor:
    """Widen blocks of 32: a scale, a least value, 5 bits each."""
    return _widened(stored, 32, 24, lambda b: (_half(b, 0) * _five(b[:, 4:8], b[:, 8:])) + _half(b, 2))


def q8_0(stored: Stored) -> Tensor:
    """Widen blocks of 32: a scale, 8 bits each."""
    return _widened(stored, 32, 34, lambda b: b[:, 2:].view(torch.int8).float() * _half(b, 0))


def q4_k(stored: Stored) -> Tensor:
    """Widen blocks of 256: 8 scales and least values of 6 bits, 4 bits each."""

    def values(b: Tensor) -> Tensor:
        scale, least = _scales(b)
        return ((scale * _nibbles(b[:, 16:], 32).view(-1, 8, 32)) - least).view(-1, 256)

    return _widened(stored, 256, 144, values)


def q5_k(stored: Stored) -> Tensor:
    """Widen blocks of 256: 8 scales and least values of 6 bits, 5 bits each."""

    def values(b: Tensor) -> Tensor:
        scale, least = _scales(b)
        shifts = torch.arange(8, dtype=torch.uint8, device=b.device).view(1, 8, 1)
        high = ((b[:, 16:48].unsqueeze(1) >> shifts) & 1).float() * 16
        low = _nibbles(b[:, 48:], 32).view(-1, 8, 32)
        return ((scale * (low + high)) - least).view(-1, 256)

    return _widened(stored, 256, 176, values)


def q6_k(stored: Stored) -> Tensor:
    """Widen blocks of 256: 16 scales of 8 bits, 6 bits each, less 32."""

    def values(b: Tensor) -> Tensor:
        scale = (_half(b, 208) * b[:, 192:208].view(torch.int8).float()).unsqueeze(-1)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).view(1, 1, 4, 1)
        high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).view(-1, 16, 16).float() * 16
        numbers = _nibbles(b[:, :128], 64).view(-1, 16, 16) + high - 32
        return (scale * numbers).view(-1, 256)

    return _widened(stored, 256, 210, values)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(bytes_: Tensor, run: int) -> Tensor:
    """Return float32 [n, 2 m] of m bytes a block: of each run of bytes the low halves, then the high ones."""
    n = len(bytes_)
    runs = bytes_.reshape(n, -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], 2).reshape(n, -1).float()


def _five(high: Tensor, low: Tensor) -> Tensor:
    """Return float32 [n, 32] of five bits each: the highest ones of all in 4 bytes, then halves of 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=high.device)
    bits = ((high.reshape(-1, 4, 1) >> shifts) & 1).view(-1, 32).float()
    return _nibbles(low, 16) + bits * 16


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and least values [n, 8, 1] of blocks that begin with two float16 and 12 bytes."""
    d, m, both = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scale = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], 1).float()
    least = torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], 1).float()
    return (_half(blocks, 0) * scale).unsqueeze(-1), (_half(blocks, 2) * least).unsqueeze(-1)
