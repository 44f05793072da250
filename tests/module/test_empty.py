"""Modules built without weights: parameters on meta, buffers real."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import ModelError
from blockstream.module.empty import build
from tests.support import toys


def test_parameters_are_on_meta_and_buffers_are_real():
    with blockstream.empty():
        module = toys.Rotary()
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(module.frequencies, 1.0 / torch.arange(1, toys.D + 1))
    assert module.shift.abs().sum() > 0


def test_parameters_keep_their_class_dtype_gradient_flag_and_attributes():
    class Marked(nn.Parameter):
        pass

    with blockstream.empty():
        module = nn.Module()
        made = Marked(torch.zeros(3, dtype=torch.float16), requires_grad=False)
        made.note = "kept"
        module.weight = made
    assert type(module.weight) is Marked
    assert module.weight.is_meta
    assert module.weight.dtype is torch.float16
    assert not module.weight.requires_grad
    assert module.weight.note == "kept"


def test_tied_parameters_stay_tied():
    with blockstream.empty():
        module = toys.Tied()
    assert module.head.weight is module.embed.weight


def test_weights_of_any_size_take_no_memory():
    with blockstream.empty():
        module = nn.Linear(1 << 20, 1 << 18)  # 1 TiB
        nested = nn.Embedding(1 << 24, 1 << 12)  # 256 GiB
    assert module.weight.shape == (1 << 18, 1 << 20)
    assert nested.weight.is_meta


def test_modules_built_outside_or_by_other_threads_are_not_touched():
    made = []
    with blockstream.empty():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        with blockstream.empty():
            inner = nn.Linear(2, 2)
        still = nn.Linear(2, 2)
    after = nn.Linear(2, 2)
    assert [m.weight.is_meta for m in (*made, inner, still, after)] == [False, True, True, False]


def test_an_error_while_building_ends_it():
    with pytest.raises(ZeroDivisionError), blockstream.empty():
        _ = 1 / 0
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_factory_is_built_empty_and_in_eval():
    module = build(toys.Stack)
    assert not module.training
    assert next(module.parameters()).is_meta


def test_a_class_and_its_config_are_built_the_way_the_library_does():
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    assert build((T5EncoderModel, config)).config.d_model == 16
    vae = build((AutoencoderKL, {"block_out_channels": [32], "norm_num_groups": 8}))
    assert vae.config.norm_num_groups == 8
    assert all(p.is_meta for p in vae.parameters())
    assert build((toys.Stack, {"n": 2})).blocks[1] is not None


def test_a_factory_of_something_else_is_refused():
    with pytest.raises(ModelError, match="returned dict"):
        build(dict)
