import pytest
import torch

from movd.layers import per_frame, position_table
from movd.official import load_official
from movd.stdit3 import STDiT3, STDiT3Config

pytestmark = pytest.mark.golden
FOLDER = "stdit3_tiny"
CASES = ["case1_basic", "case2_oddpad", "case3_xmask", "case4_image_cfg_layout", "case5_nomask"]


@pytest.fixture(scope="module")
def model(golden):
    model = STDiT3(STDiT3Config(**golden.meta["config"]))
    load_official(model, golden.weights)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_the_output_and_every_layer_equal_the_originals(model, golden, case):
    given, want = golden.given(case), golden.expected(case)
    seen, hooks = {}, []
    for name in want.keys() - {"out", "pos_embed", "t_mlp"}:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda m, a, y, n=name: seen.update({n: y})))
    hooks.append(model.t_block.register_forward_hook(lambda m, a, y: seen.update(t_mlp=y)))
    out = model(**given)
    for hook in hooks:
        hook.remove()
    grid = model.grid(*given["x"].shape[2:])
    table = model.position_table(grid, float(given["height"][0]), float(given["width"][0]))
    seen["pos_embed"], seen["out"] = table, out
    assert seen.keys() == want.keys()
    for name, value in want.items():
        golden.close(seen[name].reshape(value.shape), value, f"{case}.{name}")


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_on_tiny_inputs_equals_the_original(model, golden, kind, masked):
    given, want = golden.given("unit_block_small"), golden.expected("unit_block_small")
    frames, places, lengths = (golden.meta["cases"]["unit_block_small"][k] for k in ("T", "S", "y_lens"))
    block = model.get_submodule(f"{kind}_blocks.0")
    m = given["t_mlp"][:, None]
    if masked:
        m = per_frame(given["x_mask"], given["t_mlp"], given["t0_mlp"])
    parts = given["y_packed"][0].split(lengths)
    y = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    keep = torch.arange(y.shape[1]) < torch.tensor(lengths)[:, None]
    rope = model.rope(torch.arange(frames)) if kind == "temporal" else ()
    x = block(given["x"].unflatten(1, (frames, places)), m, y, keep, *rope)
    name = f"{kind}_blocks.0" + (".xmask" if masked else "")
    golden.close(x.flatten(1, 2), want[name], name)


def test_position_tables_equal_the_originals(golden):
    tables = golden.expected("unit_pos_embed")
    assert tables
    for name, want in tables.items():
        h, w, scale, base = (float(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in name.split("_"))
        got = position_table(want.shape[-1], int(h), int(w), scale, int(base))
        golden.close(got, want[0], name)
