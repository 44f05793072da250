"""Operations are written down where a forward runs without data, and can be run again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from blockstream.module.recorded import MOST_FLOPS, Written, product, runnable, written
from blockstream.module.rehearsal import rehearse

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = nn.functional.gelu(block(x))
        q = x.view(1, 2, -1, 8)
        x = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.conv(x).to(torch.bfloat16), torch.stack([x, x]), x.transpose(2, 3).contiguous()


def test_every_operation_of_a_forward_is_written_by_its_module_and_runs_again():
    work = rehearse(Net(), torch.zeros(1, 8, dtype=torch.long)).work
    assert work.times["blocks.0"] == work.times[""] == 1
    of = {path: {json.loads(work.ops[i].spec)[0] for i in counts} for path, counts in work.own.items()}
    assert of["blocks.0"] == {"addmm"} and of["table"] == {"embedding"} and of["conv"] == {"convolution"}
    assert {"gelu", "stack", "_to_copy"} <= of[""]
    assert work.own["blocks.0"] == work.own["blocks.1"], "equal operations are one"
    assert {op.kind for op in work.ops} == {"product", "attention", "convolution", "memory"}
    for op in work.ops:
        ready = runnable(op)
        assert ready.times == 1.0
        ready.call()


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mm.default, [(9000, 4096), (4096, 10240)]),
        (aten.addmm.default, [(10240,), (300, 4096), (4096, 10240)]),
        (aten.bmm.default, [(64, 300, 64), (64, 64, 300000)]),
        (aten.convolution.default, [(1, 64, 17, 64, 64), (64, 64, 3, 3, 3), None, [1] * 3, [1] * 3, [1] * 3]),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, [(4, 16, 5000, 64)] * 3),
        (aten.gelu.default, [(40, 300, 40960)]),
    ],
)
def test_a_long_operation_is_run_on_less_and_stands_for_the_whole(func, args):
    def operand(x):
        return torch.empty(x, device="meta") if isinstance(x, tuple) else x

    given = [operand(x) for x in args]
    if func is aten.convolution.default:
        given += [False, [0] * 3, 1]
    flops = 1e12
    op = written(func, given, {}, flops, [torch.empty(40, 300, 40960, device="meta")])
    ready = runnable(op)
    assert ready.times > 2
    ready.call()


def test_what_has_no_text_is_counted_and_not_run():
    class Odd:
        pass

    op = written(aten.mm.default, (Odd(),), {}, 5.0, [])
    assert op.spec == "" and runnable(op) is None


def test_calls_inside_calls_belong_to_the_innermost_module():
    ones = torch.ones(2, 2)
    log = Written()
    log.add(aten.mm.default, (ones, ones), {}, 16.0, [ones], 1)
    log.enter("a")
    log.add(aten.mm.default, (ones, ones), {}, 16.0, [ones], 2.5)
    log.leave()
    work = log.work({"": 1, "a": 1})
    assert len(work.ops) == 1 and work.own == {"": {0: 1}, "a": {0: 2.5}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_product_tells_the_speed_of_a_dtype(dtype):
    op = product(dtype)
    assert op.flops < MOST_FLOPS and runnable(op).times == 1.0
