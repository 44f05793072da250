from dataclasses import replace

import pytest
import torch

from blockstream.errors import ModelError
from blockstream.module.attention import UNCHANGED, attention_hooks
from blockstream.plugins import Merge
from movd.attention import FEW_KEYS, Attention, attention, attention_layers, rotate
from tests.support import movd_tiny as tiny

GRID, TEXT = (3, 2, 3), 6


@pytest.fixture
def model():
    return tiny.stdit3()


def seams(model):
    return [module.seam for module in model.modules() if isinstance(module, Attention)]


def plain(q, k, v, layer):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def test_without_a_transform_nothing_changes(model):
    inputs = tiny.dit_inputs()
    want = model(**inputs)
    with attention_hooks(
        attention_layers(model, GRID, TEXT), token_merge=lambda _: None, attention_kernel=lambda _: None
    ) as changed:
        assert changed == []
        assert all(seam is UNCHANGED for seam in seams(model))
        assert torch.equal(model(**inputs), want)


def test_an_inactive_merge_changes_no_bit(model):
    inputs = tiny.dit_inputs()
    want = model(**inputs)
    merge = Merge(lambda x: x[:, :1], lambda y: y.expand(-1, 3, -1, -1), torch.zeros(1), lambda: False)
    with attention_hooks(attention_layers(model, GRID, TEXT), token_merge=lambda _: merge) as changed:
        assert len(changed) == 8
        assert torch.equal(model(**inputs), want)


def test_every_layer_is_told_its_kind_and_shape_once(model):
    asked = []
    with attention_hooks(attention_layers(model, GRID, TEXT), token_merge=asked.append):
        pass
    assert len({layer.name for layer in asked}) == len(asked) == 8
    kinds = {layer.name: layer.kind for layer in asked}
    assert kinds["spatial_blocks.0.attn"] == "spatial"
    assert kinds["temporal_blocks.1.attn"] == "temporal"
    assert kinds["temporal_blocks.1.cross_attn"] == "cross"
    for layer in asked:
        assert (layer.T, layer.S, layer.width, layer.heads) == (3, 6, 32, 2)
        assert layer.text_tokens == (6 if layer.kind == "cross" else 0)


def test_a_kernel_replaces_every_attention_and_sees_ragged_text_a_sample_at_a_time(model):
    inputs = tiny.dit_inputs(lengths=(6, 3))
    want, seen = model(**inputs), []

    def kernel(q, k, v, layer):
        seen.append((layer.kind, tuple(q.shape), tuple(k.shape)))
        return plain(q, k, v, layer)

    with attention_hooks(attention_layers(model, GRID, TEXT), attention_kernel=lambda _: kernel):
        got = model(**inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert seen[:4] == [
        ("spatial", (6, 2, 6, 16), (6, 2, 6, 16)),  # rows: B * T
        ("cross", (1, 2, 18, 16), (1, 2, 6, 16)),
        ("cross", (1, 2, 18, 16), (1, 2, 3, 16)),
        ("temporal", (12, 2, 3, 16), (12, 2, 3, 16)),  # rows: B * S
    ]


def test_the_kernel_of_a_merged_layer_is_asked_for_with_its_length(model):
    merge = Merge(lambda x: x[:, :2], lambda y: y[:, [0, 1, 1]], torch.tensor([0.5, 2.0]))
    lengths = []

    def kernel_of(layer):
        def kernel(q, k, v, given):
            assert replace(given, trailing=layer.trailing) == layer
            if layer.kind == "temporal":
                lengths.append((q.shape[2], layer.T))
            return plain(q, k, v, layer)

        return kernel

    with attention_hooks(
        attention_layers(model, GRID, TEXT), token_merge=lambda _: merge, attention_kernel=kernel_of
    ):
        model(**tiny.dit_inputs())
    assert set(lengths) == {(2, 2)}


def test_merged_tokens_turn_by_the_merges_own_positions(model):
    inputs = tiny.dit_inputs()

    def out(positions):
        merge = Merge(lambda x: x[:, :2], lambda y: y[:, [0, 1, 1]], torch.tensor(positions))
        of_time = {"token_merge": lambda layer: merge if layer.kind == "temporal" else None}
        with attention_hooks(attention_layers(model, GRID, TEXT), **of_time):
            return model(**inputs)

    torch.testing.assert_close(out([0.0, 1.5]), out([2.0, 3.5]), atol=1e-5, rtol=1e-5)  # only distance counts
    assert (out([0.0, 1.0]) - out([0.0, 1.5])).abs().max() > 1e-3


def test_hooks_are_cleared_when_a_run_ends_or_a_hook_fails(model):
    merge = Merge(lambda x: x, lambda y: y, torch.arange(3))
    with attention_hooks(attention_layers(model, GRID, TEXT), token_merge=lambda _: merge):
        assert all(seam is not UNCHANGED for seam in seams(model))
    assert all(seam is UNCHANGED for seam in seams(model))

    def fails_late(layer):
        if layer.name == "temporal_blocks.1.attn":
            raise RuntimeError("no merge for you")
        return merge

    with (
        pytest.raises(RuntimeError, match="no merge"),
        attention_hooks(attention_layers(model, GRID, TEXT), token_merge=fails_late),
    ):
        pytest.fail("the hook failed")
    assert all(seam is UNCHANGED for seam in seams(model))


def test_a_layer_resolved_for_another_shape_says_so(model):
    merge = Merge(lambda x: x, lambda y: y, torch.arange(4))
    with (
        attention_hooks(attention_layers(model, (4, 2, 3), TEXT), token_merge=lambda _: merge),
        pytest.raises(ModelError, match=r"resolved for 4 frames of 6 tokens, not 3 of 6"),
    ):
        model(**tiny.dit_inputs())


@pytest.mark.parametrize("keys", [FEW_KEYS, FEW_KEYS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_compute_attention_agree_and_hide_keys(keys, dtype):
    q, k, v = (tiny.noise(2, 3, n, 8, key=i).to(dtype) for i, n in enumerate((5, keys, keys)))
    keep = torch.arange(keys) < torch.tensor([[keys], [4]])[:, :, None, None]
    got = attention(q, k, v, keep)
    for i, n in enumerate((keys, 4)):
        want = plain(q[i : i + 1].float(), k[i : i + 1, :, :n].float(), v[i : i + 1, :, :n].float(), None)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[i : i + 1].float(), want, atol=tolerance, rtol=tolerance)


def test_rotation_turns_interleaved_pairs():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    angle = torch.tensor([[0.3, 0.5]])
    got = rotate(x, (angle.cos(), angle.sin()))
    a, b = angle[0]
    torch.testing.assert_close(got[0], torch.stack((a.cos(), a.sin(), -b.sin(), b.cos())))
