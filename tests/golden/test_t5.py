import pytest

from movd.official import load_official
from movd.t5 import t5_encoder

pytestmark = pytest.mark.golden
FOLDER = "t5_encoder_tiny"


@pytest.fixture(scope="module")
def model(golden):
    model = t5_encoder(golden.meta["config"])
    load_official(model, golden.weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_encoder_and_every_block_equal_the_originals(model, golden, case):
    given, want = golden.given(case), golden.expected(case)
    hidden, last = [], model.encoder.final_layer_norm
    hooks = [
        block.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for block in model.encoder.block
    ]
    hooks.append(last.register_forward_hook(lambda _, args, out: hidden.append(out)))
    out = model(**given)
    for hook in hooks:
        hook.remove()
    golden.close(out.last_hidden_state, want["last_hidden_state"], "last_hidden_state")
    layers = [name for name in want if name.startswith("hidden_states.")]
    assert len(layers) == len(hidden) == golden.meta["config"]["num_layers"] + 1
    for i, layer in enumerate(hidden):
        golden.close(layer, want[f"hidden_states.{i}"], f"hidden_states.{i}")


def test_the_position_bias_equals_the_originals(model, golden):
    want = golden.expected("case0")["position_bias"]
    length = want.shape[-1]
    attention = model.encoder.block[0].layer[0].SelfAttention
    golden.close(attention.compute_bias(length, length), want, "position_bias")


def test_the_state_dict_has_the_official_keys(model, golden):
    assert sorted(model.state_dict()) == sorted(golden.meta["keys"])
