"""Widen weights of one byte with scales beside them: fp8 and int8, a scale a tensor, row, group or block.

`about` says the `dtype` of the bytes and the `block` [rows, columns] that one scale is for; `via` the dtype
in which the product is taken ("F32", or that of the scales); `then` what the product is multiplied by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockstream.module.chunks import chunks
from blockstream.module.dtypes import to_torch
from blockstream.module.narrow import Stored

#: Elements widened at a time.
STEP = 1 << 20


def scaled(stored: Stored) -> Tensor:
    """Return the weight: each element times the scale of its block, rounded once to its dtype."""
    about, columns = stored.about, stored.shape[-1]
    numbers = stored.raw.view(to_torch(about["dtype"])).view(-1, columns)
    high, wide = about["block"]
    scale = stored.beside["scale"]
    if scale.dtype == torch.uint8:  # exponents
        scale = (scale.float() - 127).exp2()
    via = torch.float32 if about.get("via", "F32") == "F32" else scale.dtype
    scale = scale.reshape(-1, -(-columns // wide)).to(via)
    made = torch.empty(numbers.shape, dtype=stored.dtype, device=numbers.device)
    for some in chunks(len(numbers), max(STEP // columns, 1)):
        rows = torch.arange(some.start, some.stop, device=numbers.device) // high
        each = scale[rows]
        if each.shape[1] > 1:
            each = each.repeat_interleave(wide, 1)[:, :columns]
        product = numbers[some].to(via) * each
        made[some] = product * about["then"] if "then" in about else product
    return made.view(stored.shape)
