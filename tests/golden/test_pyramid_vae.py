import pytest
import torch

from movd.official import load_official
from movd.pyramid.causal_vae import CausalVAEConfig, CausalVideoVAE, PyramidDecoder, PyramidEncoder

pytestmark = pytest.mark.golden
FOLDER = "pyramid_vae_tiny"
DECODES = ["decode_whole", "decode_chunk1", "decode_chunk2", "decode_image", "decode_tiled"]
ENCODES = ["encode_whole", "encode_chunk8", "encode_image", "encode_tiled"]


@pytest.fixture(scope="module")
def halves(golden):
    config = CausalVAEConfig(**golden.meta["config"])
    whole = CausalVideoVAE(config)
    load_official(whole, golden.weights)
    made = {"encode": PyramidEncoder(config), "decode": PyramidDecoder(config)}
    for half in made.values():
        load_official(half, {k: v for k, v in golden.weights.items() if k in half.state_dict()})
        half.eval().requires_grad_(False)
    return made


def given(golden, name, tensor):
    source = golden.meta["cases"][name][tensor]
    return golden.given(source if isinstance(source, str) else name)[tensor]


@pytest.mark.parametrize("name", DECODES)
def test_decoding_whole_in_chunks_and_in_tiles_equals_the_original(halves, golden, name):
    z, case, decoder = given(golden, name, "z"), golden.meta["cases"][name], halves["decode"]
    window = case["kw"].get("window_size")
    seen, hooks = {}, []
    want = golden.expected(name)
    for path in want.keys() - {"x"}:
        module = decoder.get_submodule(path)
        hooks.append(module.register_forward_hook(lambda m, a, y, path=path: seen.update({path: y})))
    if "tiling" in case:
        x = decoder.decode_tiles(z, window, case["kw"]["tile_sample_min_size"])
    elif window is None:
        x = decoder(z)
    else:
        x = torch.cat(list(decoder.decode_chunks(z, window)), 2)
    for hook in hooks:
        hook.remove()
    golden.close(x, want["x"], name)
    for path, value in seen.items():
        golden.close(value, want[path], path)


@pytest.mark.parametrize("name", ENCODES)
def test_encoding_equals_the_original(halves, golden, name):
    x, case, encoder = given(golden, name, "x"), golden.meta["cases"][name], halves["encode"]
    window = case["kw"].get("window_size")
    if "tiling" in case:
        moments = encoder.encode_tiles(x, window, case["kw"]["tile_sample_min_size"])
    elif window is None:
        moments = encoder(x)
    else:
        moments = torch.cat(list(encoder.encode_chunks(x, window)), 2)
    golden.close(moments, golden.expected(name)["moments"], name)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_chunks_of_any_size_equal_the_whole(halves, golden, window):
    z, decoder = given(golden, "decode_chunk2", "z"), halves["decode"]
    x = torch.cat(list(decoder.decode_chunks(z, window)), 2)
    torch.testing.assert_close(x, decoder(z), atol=1e-5, rtol=0)
    assert all(m.kept is None for m in decoder.modules() if hasattr(m, "kept"))
