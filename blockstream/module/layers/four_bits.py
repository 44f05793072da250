"""Widen weights of four bits: bitsandbytes' nf4 and fp4, whose table is in the file, and MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from blockstream.module.chunks import chunks
from blockstream.module.dtypes import to_torch
from blockstream.module.narrow import Stored

#: Elements widened at a time.
STEP = 1 << 20
#: The numbers of E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def bitsandbytes_4bit(stored: Stored) -> Tensor:
    """Return a weight that is a table's entry times its block's largest: `absmax`, itself coded where nested.

    `about`: `blocksize`, `dtype` (in which the library gives the numbers), those of what is nested.
    """
    about, beside = stored.about, stored.beside
    size, table = about["blocksize"], beside["quant_map"]
    largest = beside["absmax"]
    if "nested_absmax" in beside:
        outer = beside["nested_absmax"].repeat_interleave(about["nested_blocksize"])[: largest.numel()]
        largest = beside["nested_quant_map"][largest.reshape(-1).long()] * outer + about["nested_offset"]
    raw, largest = stored.raw, largest.reshape(-1)
    made = torch.empty(2 * raw.numel(), dtype=stored.dtype, device=raw.device)
    step = max(STEP // size, 1) * size
    for some in chunks(len(made), step):
        numbers = _halves(raw[some.start // 2 : some.stop // 2], table, high_first=True)
        blocks = largest[some.start // size : -(-some.stop // size)]
        made[some] = (numbers * blocks.repeat_interleave(size)[: len(numbers)]).to(to_torch(about["dtype"]))
    return made.view(stored.shape)


def mxfp4(stored: Stored) -> Tensor:
    """Return experts [n, columns, rows]: stored by rows in blocks of 32 with one power of two each."""
    experts, columns, rows = stored.shape
    table = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=stored.raw.device)
    raw = stored.raw.view(experts, rows, columns // 2)
    powers = stored.beside["scale"].view(experts, rows, columns // 32)
    made = torch.empty(experts, columns, rows, dtype=stored.dtype, device=raw.device)
    for i in range(experts):
        for some in chunks(rows, max(STEP // columns, 1)):
            numbers = _halves(raw[i, some].reshape(-1), table, high_first=False).view(-1, columns // 32, 32)
            power = (powers[i, some].float() - 127).unsqueeze(-1)
            made[i, :, some] = (numbers * power.exp2()).view(-1, columns).t()
    return made


def _halves(raw: Tensor, table: Tensor, *, high_first: bool) -> Tensor:
    """Return the table's entries for both halves of each byte, float32 [2 n]."""
    high, low = (raw >> 4).long(), (raw & 15).long()
    return table[torch.stack([high, low] if high_first else [low, high], -1).reshape(-1)].float()
