"""What is computed chunk by chunk is sized by its first chunks, and computed by all of them."""

from __future__ import annotations

import pytest
import torch

from blockstream.module.chunks import chunks, sizing
from blockstream.module.rehearsal import Alive
from tests.support import movd_tiny as tiny


@pytest.mark.parametrize(
    ("length", "step", "want"),
    [(10, 4, [(0, 4), (4, 8), (8, 10)]), (7, 4, [(0, 4), (4, 7)]), (4, 4, [(0, 4)]), (0, 4, [])],
)
def test_chunks_cover_the_length_and_are_two_while_a_forward_is_sized(length, step, want):
    def cut():
        return [(x.start, x.stop) for x in chunks(length, step)]

    assert cut() == want
    with sizing():
        assert cut() == want[:2]
    assert cut() == want


def test_an_exception_ends_the_sizing():
    with pytest.raises(ZeroDivisionError), sizing():
        raise ZeroDivisionError
    assert len(list(chunks(10, 1))) == 10


@pytest.mark.parametrize("tokens", [6, 12])
def test_a_forward_that_is_sized_holds_as_much_as_one_that_is_run(tokens, monkeypatch):
    monkeypatch.setattr("movd.layers.MLP_TOKENS", tokens)
    monkeypatch.setattr("movd.attention.ATTENTION_TOKENS", tokens)

    model, inputs = tiny.stdit3(), tiny.dit_inputs()

    def peak() -> tuple[int, int]:
        calls = 0

        class Counting(Alive):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal calls
                calls += 1
                return super().__torch_dispatch__(func, types, args, kwargs)

        with torch.no_grad(), Counting() as alive:
            model(**inputs)
        return alive.peak_nbytes, calls

    whole, every = peak()
    with sizing():
        sized, some = peak()
    assert sized == whole
    assert some < every


def test_operations_of_chunks_left_out_are_counted():
    weight = torch.empty(8, 8)

    def forward(x):
        return [[x[a, b] @ weight for b in chunks(16, 4)] for a in chunks(10, 4)]

    with Alive() as whole:
        forward(torch.empty(10, 16, 8))
    with Alive() as sized, sizing():
        forward(torch.empty(10, 16, 8))
    assert sized.flops == whole.flops == 2 * 10 * 16 * 8 * 8
