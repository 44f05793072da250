import pytest
import torch

from blockstream.errors import CheckpointError
from movd.official import check_keys, likely_variant, load_official, shapes_of
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import t5_encoder
from tests.support import movd_tiny as tiny


@pytest.fixture
def model():
    return tiny.stdit3()


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def other_weights(model):
    return {key: tensor + 1 for key, tensor in state(model).items()}


def test_a_checkpoint_that_fits_is_copied_in(model):
    given = other_weights(model)
    load_official(model, given)
    assert all(torch.equal(tensor, given[key]) for key, tensor in model.state_dict().items())


def test_a_model_on_meta_takes_the_tensors_themselves(model):
    with torch.device("meta"):
        empty = STDiT3(STDiT3Config(**tiny.STDIT3))
    given = state(model)
    load_official(empty, given)
    assert empty.final_layer.linear.weight.data_ptr() == given["final_layer.linear.weight"].data_ptr()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(model, change):
    before, given = state(model), other_weights(model)
    if change == "missing":
        del given["rope.freqs"]
    elif change == "unexpected":
        given["pos_embed_temporal"] = torch.zeros(1)
    else:
        given["rope.freqs"] = torch.zeros(3)
    with pytest.raises(CheckpointError):
        load_official(model, given)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_error_counts_names_and_shows_the_first_few(model):
    given = state(model)
    for key in [key for key in given if key.startswith("spatial_blocks.1.")]:
        del given[key]
    given["extra.weight"] = torch.zeros(1)
    given["t_block.1.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_official(model, given, what="model.safetensors")
    message = str(error.value)
    assert message.startswith(
        "model.safetensors does not fit STDiT3: 17 missing (spatial_blocks.1.attn.k_norm"
    )
    assert "and 14 more)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "t_block.1.bias is (7,), not (192,)" in message


@pytest.mark.parametrize(
    ("keys", "variant"),
    [
        (["blocks.0.attn_temp.qkv.weight", "x_embedder.proj.weight"], "STDiT2"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.bias", "quant_conv.bias"], "2-D"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.x"], "with its decoder"),
        (["spatial_vae.module.quant_conv.bias", "temporal_vae.quant_conv.conv.bias"], "OpenSora-VAE"),
    ],
)
def test_foreign_weights_are_recognised(model, keys, variant):
    with pytest.raises(CheckpointError, match=f"looks like .*{variant}"):
        check_keys(model, dict.fromkeys(keys, (1,)))


def test_an_stdit3_of_another_size_is_recognised():
    shapes = shapes_of(tiny.stdit3().state_dict())
    assert likely_variant(shapes) == "an STDiT3 of depth 2 and hidden_size 32"
    assert likely_variant({"lm_head.weight": (1,)}) is None


@pytest.mark.parametrize("absent", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_of_two_keys_of_one_tensor_is_enough(absent, device):
    given = state(tiny.t5())
    del given[absent]
    with torch.device(device):
        model = t5_encoder(tiny.T5)
    load_official(model, given)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    [present] = {"shared.weight", "encoder.embed_tokens.weight"} - {absent}
    assert torch.equal(model.shared.weight, given[present])


def test_a_tensor_without_any_of_its_keys_is_missing():
    given = shapes_of(tiny.t5().state_dict())
    del given["shared.weight"], given["encoder.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"2 missing \(encoder.embed_tokens.weight, shared.weight\)"):
        check_keys(tiny.t5(), given)
