import re

import pytest
import torch

from blockstream.errors import ConfigError
from movd.layers import position_table
from movd.stdit3 import STDIT3_XL_2, STDiT3, STDiT3Config
from tests.support import movd_tiny as tiny
from tests.support.while_running import only_while_running


@pytest.fixture(scope="module")
def model():
    return tiny.stdit3()


def test_blocks_read_their_weights_only_while_they_run_and_in_the_declared_order(model):
    inputs = tiny.dit_inputs()
    known = torch.tensor([[True, False, True], [True, True, True]])
    want = model(**inputs, x_mask=known)
    streamed = tiny.stdit3()
    with only_while_running(streamed, streamed.stream_order()) as visits:
        got = streamed(**inputs, x_mask=known)
    assert torch.equal(got, want)
    assert tuple(visits) == streamed.stream_order()
    assert visits[:3] == ["spatial_blocks.0", "temporal_blocks.0", "spatial_blocks.1"]


def test_samples_of_a_batch_with_texts_of_different_length_equal_each_alone(model):
    inputs = tiny.dit_inputs(lengths=(6, 2))
    together = model(**inputs)
    for i in range(2):
        shared = ("fps", "height", "width")
        alone = {k: v if k in shared else v[i : i + 1] for k, v in inputs.items()}
        torch.testing.assert_close(together[i : i + 1], model(**alone), atol=1e-5, rtol=1e-5)


def test_tokens_that_the_mask_hides_change_nothing(model):
    inputs = tiny.dit_inputs(lengths=(4, 3))
    before = model(**inputs)
    inputs["y"] = torch.where(inputs["mask"][:, None, :, None].bool(), inputs["y"], 1e3)
    assert torch.equal(model(**inputs), before)


def test_a_mask_with_holes_keeps_its_tokens_in_order(model):
    y = tiny.noise(1, 1, 6, 8, key=9)
    text, keep = model.text(y, torch.tensor([[1, 0, 1, 0, 0, 1]]))
    torch.testing.assert_close(text, model.y_embedder(y)[:, 0, [0, 2, 5]])
    assert keep is None


def test_one_row_of_the_mask_serves_both_halves_of_guidance(model):
    inputs = tiny.dit_inputs(lengths=(3, 3))
    once = {**inputs, "mask": inputs["mask"][:1]}
    assert torch.equal(model(**once), model(**inputs))


def test_a_sample_without_text_is_refused_by_number(model):
    with pytest.raises(ValueError, match="no text token of sample 1"):
        model(**tiny.dit_inputs(lengths=(2, 0)))


def test_a_missing_size_or_fps_is_refused(model):
    inputs = tiny.dit_inputs()
    del inputs["fps"]
    with pytest.raises(ValueError, match="fps"):
        model(**inputs)


def test_known_frames_alone_are_modulated_by_time_zero(model):
    inputs = tiny.dit_inputs()
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(model(**inputs, x_mask=everything), model(**inputs))
    known = everything.clone()
    known[:, 0] = False
    assert not torch.allclose(model(**inputs, x_mask=known), model(**inputs))


def test_patches_in_time_are_cut_and_put_back():
    model = tiny.stdit3(patch_size=(2, 2, 2))
    inputs = tiny.dit_inputs(frames=3, height=5, width=3)
    assert model.grid(3, 5, 3) == (2, 3, 2)
    assert model(**inputs).shape == (2, 8, 3, 5, 3)
    t, h, w, c = 2, 3, 2, 8
    patches = tiny.noise(1, t, h * w, 2 * 2 * 2 * c, key=7)
    got = model.unpatchify(patches, torch.Size((3, 5, 3)))
    want = patches.view(t, h, w, 2, 2, 2, c).permute(6, 0, 3, 1, 4, 2, 5).reshape(c, 4, 6, 4)
    assert torch.equal(got[0], want[:, :3, :5, :3])


def test_width_comes_first_in_the_position_table():
    table = position_table(8, rows=2, columns=3, scale=1.0, base=2).view(2, 3, 2, 4)
    assert torch.equal(table[0, :, 1], table[0, :1, 1].expand(3, -1))  # a row's half: alike along it
    assert torch.equal(table[:, 1, 0], table[:1, 1, 0].expand(2, -1))
    assert table[0, 0, 0].tolist() == [0, 0, 1, 1]  # sin before cos


def test_captions_drop_out_in_training_only():
    model = tiny.stdit3(class_dropout_prob=1.0)
    y = tiny.noise(2, 1, 6, 8, key=3)
    null = model.y_embedder.y_embedding.expand(2, 1, -1, -1)
    assert not torch.equal(model.y_embedder(y), model.y_embedder(null))
    model.train()
    assert torch.equal(model.y_embedder(y), model.y_embedder.y_proj(null))


def test_an_untrained_model_predicts_zero_and_learns():
    torch.manual_seed(0)
    model = STDiT3(STDiT3Config(**tiny.STDIT3))
    out = model(**tiny.dit_inputs())
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0


def test_sixteen_bit_weights_stay_near_thirty_two():
    inputs = tiny.dit_inputs()
    half = tiny.stdit3().to(torch.bfloat16)(**inputs)
    assert half.dtype == torch.float32
    assert (half - tiny.stdit3()(**inputs)).abs().mean() < 0.05


def test_a_block_traces_and_exports():
    model = tiny.stdit3()
    block = model.temporal_blocks[0]
    x, m = tiny.noise(1, 3, 4, 32, key=1), tiny.noise(1, 1, 192, key=2)
    y, (cos, sin) = tiny.noise(1, 5, 32, key=3), model.rope(torch.arange(3))
    args = (x, m, y, None, cos, sin)
    want = block(*args)
    exported = torch.export.export(block, args)
    torch.testing.assert_close(exported.module()(*args), want)


def test_the_full_size_model_has_the_released_keys_and_parameters():
    with torch.device("meta"):
        model = STDiT3(STDIT3_XL_2)
    keys = model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == 1_207_643_936
    assert len(keys) == 973
    assert {re.sub(r"blocks\.\d+", "blocks.N", key) for key in keys} == {
        re.sub(r"blocks\.\d+", "blocks.N", key) for key in tiny.stdit3().state_dict()
    }


def test_the_released_config_is_accepted_whole():
    config = STDiT3Config(
        architectures=["STDiT3"],
        model_type="STDiT3",
        torch_dtype="float32",
        transformers_version="4.38.2",
        caption_channels=4096,
        class_dropout_prob=0.1,
        depth=28,
        drop_path=0.0,
        enable_flash_attn=True,
        enable_layernorm_kernel=True,
        enable_sequence_parallelism=False,
        freeze_y_embedder=True,
        hidden_size=1152,
        in_channels=4,
        input_size=[None, None, None],
        input_sq_size=512,
        mlp_ratio=4.0,
        model_max_length=300,
        num_heads=16,
        only_train_temporal=False,
        patch_size=[1, 2, 2],
        pred_sigma=True,
        qk_norm=True,
        skip_y_embedder=False,
    )
    assert config == STDIT3_XL_2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hiden_size": 96}, "'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "STDiT2"}, "stdit2.*only STDiT3"),
        ({"no_temporal_pos_emb": True}, "belongs to STDiT or STDiT2"),
        ({"skip_y_embedder": True}, "skip_y_embedder = True is not supported"),
        ({"depth": "many"}, "depth = 'many'"),
        ({"hidden_size": 100, "num_heads": 16}, "twice num_heads"),
    ],
)
def test_a_config_of_something_else_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        STDiT3Config(**given)


@pytest.mark.parametrize("tokens", [1, 5, 7, 17])
def test_a_few_tokens_at_a_time_give_what_all_at_once_do(tokens, monkeypatch):
    model, inputs = tiny.stdit3(), tiny.dit_inputs()
    want = model(**inputs)
    monkeypatch.setattr("movd.layers.MLP_TOKENS", tokens)
    monkeypatch.setattr("movd.attention.ATTENTION_TOKENS", tokens)
    hidden, projected = [], []
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.mlp.fc1.register_forward_hook(lambda m, args, y: hidden.append(y.shape[:-1].numel()))
        block.attn.qkv.register_forward_hook(lambda m, args, y: projected.append(y.shape[:-1].numel()))
    torch.testing.assert_close(model(**inputs), want, atol=1e-5, rtol=1e-5)
    tokens_in_all = 4 * 2 * 3 * 6
    assert (sum(hidden), sum(projected)) == (tokens_in_all, tokens_in_all)
    assert max(hidden) <= tokens
    assert max(projected) <= max(tokens, 6)  # whole sequences: of 6 places, of 3 frames
