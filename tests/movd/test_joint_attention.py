"""The seam in HunyuanVideo's attentions: merged video beside untouched text, and kernels of plugins."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from blockstream.errors import ModelError
from blockstream.module.attention import attention_hooks
from blockstream.plugins import Merge
from movd.hunyuan.denoiser import angles_at, grid, joint_layers
from tests.support import families_tiny as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.hunyuan()


@pytest.fixture(scope="module")
def inputs():
    return tiny.hunyuan_inputs()


@pytest.fixture(scope="module")
def plain(model, inputs):
    return run(model, inputs)


@torch.inference_mode()
def run(model, inputs, **hooks):
    layers = joint_layers(model, inputs["hidden_states"].shape[2:], text_tokens=7)
    with attention_hooks(layers, **hooks):
        return model(**inputs, return_dict=False)[0]


def as_it_is(layer):
    return Merge(lambda x: x, lambda y: y, torch.arange(layer.T, dtype=torch.float32))


def first_only(layer):
    return Merge(lambda x: x[:, :1], lambda y: y.expand(-1, layer.T, -1, -1), torch.tensor([0.0]))


def test_every_layer_says_that_it_is_full_and_what_its_grid_is(model, inputs):
    t, h, w = grid(model, 5, 4, 6)
    layers = [layer for _, layer in joint_layers(model, (5, 4, 6), text_tokens=7)]
    assert [layer.name for layer in layers][::3] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]
    assert {(x.kind, x.grid, x.width, x.heads) for x in layers} == {("full", (t, h, w), 32, 2)}
    assert [(x.index, x.layers, x.leading, x.trailing) for x in layers] == [(i, 4, 0, 7) for i in range(4)]


def test_a_merge_that_changes_nothing_changes_no_more_than_the_angles_rounding(model, inputs, plain):
    torch.testing.assert_close(run(model, inputs, token_merge=as_it_is), plain, atol=1e-5, rtol=0)


def test_merging_shortens_video_alone_and_ends_with_the_block(model, inputs, plain):
    seen = []

    def kernel(layer):
        return lambda q, k, v, own: seen.append((q.shape, own)) or scaled_dot_product_attention(q, k, v)

    merged = run(model, inputs, token_merge=first_only, attention_kernel=kernel)
    assert {shape[2] for shape, _ in seen} == {1 * 2 * 3 + 5}
    assert {(own.T, own.S, own.text_tokens) for _, own in seen} == {(1, 6, 5)}
    assert (merged - plain).abs().max() > 1e-3
    assert torch.equal(run(model, inputs), plain)


def test_merging_without_a_kernel_computes_the_same(model, inputs):
    def kernel(layer):
        return lambda q, k, v, own: scaled_dot_product_attention(q, k, v)

    by_kernel = run(model, inputs, token_merge=first_only, attention_kernel=kernel)
    torch.testing.assert_close(run(model, inputs, token_merge=first_only), by_kernel, atol=1e-5, rtol=0)


def test_a_kernel_gets_video_then_real_text_and_its_result_is_used(model, inputs, plain):
    def kernel(layer):
        return lambda q, k, v, own: scaled_dot_product_attention(q, k, v)

    torch.testing.assert_close(run(model, inputs, attention_kernel=kernel), plain, atol=1e-5, rtol=0)
    silent = run(model, inputs, attention_kernel=lambda layer: lambda q, k, v, own: torch.zeros_like(q))
    assert (silent - plain).abs().max() > 1e-3


def test_angles_between_frames_are_those_of_the_time_between(model, inputs):
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    x = inputs["hidden_states"]
    rope = model.rope(x)
    layer = joint_layers(model, x.shape[2:], text_tokens=7)[0][1]
    positions = torch.tensor([0.5, 2.5, 4.0])
    cos, sin = (a.unflatten(0, (3, layer.S)) for a in angles_at(rope, layer, positions))
    dims = model.config.rope_axes_dim
    time = get_1d_rotary_pos_embed(dims[0], positions, 256.0, use_real=True)
    for mine, whole, want in zip((cos, sin), rope, time, strict=True):
        torch.testing.assert_close(mine[:, 0, : dims[0]], want, atol=1e-6, rtol=0)
        places = whole.unflatten(0, (layer.T, layer.S))[0, :, dims[0] :]
        torch.testing.assert_close(mine[1, :, dims[0] :], places, atol=1e-6, rtol=0)


def test_another_shape_than_the_resolved_one_is_refused(model, inputs):
    layers = [
        (seam, replace(layer, grid=(2, 2, 3)))
        for seam, layer in joint_layers(model, (5, 4, 6), text_tokens=7)
    ]
    with (
        attention_hooks(layers, token_merge=as_it_is),
        pytest.raises(ModelError, match="2 frames of 6 tokens"),
    ):
        model(**inputs, return_dict=False)
