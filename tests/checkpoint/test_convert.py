from __future__ import annotations

import numpy as np
import pytest
import torch

from blockstream.checkpoint.read.convert import FLOAT8, STEP, can_convert, convert
from blockstream.module.dtypes import to_torch

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EDGES = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 6e-8, 1e-40, 3.4e38, 1.00390625, 1.01171875]
SPECIAL = [float("inf"), float("-inf"), float("nan"), 3.3895314e38]


def convert_like_torch(x: torch.Tensor, dst: str) -> None:
    src = {v: k for k, v in TORCH.items()}[x.dtype]
    room = bytearray(x.numel() * TORCH[dst].itemsize)
    raw = x.view(torch.uint8).numpy().tobytes()
    convert(memoryview(raw), src, memoryview(room), dst)
    got, want = torch.frombuffer(room, dtype=TORCH[dst]), x.to(TORCH[dst])
    assert torch.equal(got.isnan(), want.isnan())
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.itemsize]
    number = ~want.isnan()
    assert torch.equal(got.view(bits)[number], want.view(bits)[number])


@pytest.mark.parametrize("dst", list(TORCH))
@pytest.mark.parametrize("src", ["F16", "BF16"])
def test_every_16_bit_value_converts_as_torch_does(src, dst):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    convert_like_torch(every.view(TORCH[src]), dst)


@pytest.mark.parametrize("dst", ["F16", "BF16"])
def test_float32_rounds_to_nearest_even_as_torch_does(dst):
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0))
    convert_like_torch(bits.to(torch.int32).view(torch.float32), dst)
    ties = torch.arange(2**16, dtype=torch.int32) * 2**15  # every exact half of bfloat16, positive
    convert_like_torch(ties.view(torch.float32), dst)
    convert_like_torch(torch.tensor(EDGES + SPECIAL), dst)


@pytest.mark.parametrize("dst", ["F32", "F16", "BF16"])
def test_float64_is_rounded_by_way_of_float32_as_in_torch(dst):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator, dtype=torch.float64)
    convert_like_torch(x * 10.0 ** torch.randint(-45, 45, x.shape, generator=generator), dst)
    convert_like_torch(torch.tensor([*EDGES, *SPECIAL], dtype=torch.float64), dst)


def test_more_elements_than_one_step_convert_alike():
    convert_like_torch(torch.randn(2 * STEP + 3), "BF16")
    convert_like_torch(torch.randn(2 * STEP + 3).half(), "F32")


def test_equal_dtypes_are_copied_and_others_refused():
    room = bytearray(8)
    convert(memoryview(b"12345678"), "I64", memoryview(room), "I64")
    assert room == b"12345678"
    assert not can_convert("I64", "F32")
    with pytest.raises(ValueError, match="from I64 to F32"):
        convert(memoryview(np.zeros(1).tobytes()), "I64", memoryview(bytearray(4)), "F32")


@pytest.mark.parametrize("name", sorted(FLOAT8))
@pytest.mark.parametrize("to", ["F32", "BF16", "F16"])
def test_every_byte_of_an_eight_bit_float_is_what_torch_makes_of_it(name, to):
    every = torch.arange(256, dtype=torch.uint8).view(to_torch(name))
    want = every.to(to_torch(to))
    got = torch.empty(256, dtype=to_torch(to))
    src, dst = every.view(torch.uint8).numpy().data, got.view(torch.uint8).numpy().data
    assert can_convert(name, to)
    convert(src, name, dst, to)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())
