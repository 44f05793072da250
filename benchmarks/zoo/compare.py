"""Load one small model by its library's `from_pretrained` and by ours, and compare what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blockstream
from blockstream.errors import BlockstreamError
from blockstream.module.binding import tensors_in

from .models import Animal

#: Addresses alone change how kernels round: every weight lies at a multiple of this, as streamed ones do.
ALIGN = 64


def compare(animal: Animal, folder: Path, stored: torch.dtype, asked: torch.dtype | None, arena: Any) -> str:
    """Return "equal", or in words what differs or who refuses.

    The model is saved in the dtype `stored`, and loaded with `asked` (None: without).
    """
    torch.manual_seed(0)
    module = animal.make().eval()
    cls: Any = type(module)
    for param in module.parameters():
        # So that nothing is left out of the comparison.
        if param.numel() and float(param.detach().abs().max()) == 0.0:
            nn.init.normal_(param, std=0.02)
    module.to(stored).save_pretrained(folder)
    named = {"dtype" if "transformers" in cls.__module__ else "torch_dtype": asked} if asked else {}
    resident = aligned(cls.from_pretrained(folder, **named).eval())
    inputs = animal.inputs(asked or (torch.float32 if "diffusers" in cls.__module__ else stored))
    try:
        want = _run(resident, inputs)
    except Exception as error:
        return f"its library cannot: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        with blockstream.from_pretrained(folder, dtype=asked, arena=arena) as streamed:
            for _ in range(2):
                if difference := _difference(_run(streamed, inputs), want):
                    return difference
    except BlockstreamError as error:
        return f"refused: {error}"
    return "equal"


def _run(module: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor.clone() for _, tensor in tensors_in(module(**inputs))]


def _difference(got: list[Tensor], want: list[Tensor]) -> str:
    for a, b in _pairs(got, want):
        if a is None or b is None:
            return f"{len(got)} results, and {len(want)} resident"
        if a.dtype is not b.dtype or a.shape != b.shape:
            return f"{a.dtype} {list(a.shape)}, and {b.dtype} {list(b.shape)} resident"
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return (
                f"differs by {float((a.double() - b.double()).abs().max()):.2g} of {float(b.abs().max()):.2g}"
            )
    return ""


def _pairs(got: list[Tensor], want: list[Tensor]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    if len(got) != len(want):
        yield None, None
    yield from zip(got, want, strict=False)


def aligned(module: nn.Module) -> nn.Module:
    """Have every parameter begin at a multiple of `ALIGN`."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                raw = torch.empty(param.nbytes + ALIGN, dtype=torch.uint8)
                start = -raw.data_ptr() % ALIGN
                room = raw[start : start + param.nbytes].view(param.dtype).view(param.shape)
                made[id(param)] = nn.Parameter(room.copy_(param.detach()), requires_grad=False)
            owner._parameters[name] = made[id(param)]
    return module
