import pytest
import torch

from movd.hunyuan.autoencoder import HunyuanDecoder, hunyuan_vae, tiling
from movd.official import load_official
from movd.tiled import Along, Tiling, count_tiles

pytestmark = pytest.mark.golden
FOLDER = "hunyuan_vae_tiny"
DECODES = ["decode_short", "decode_image", "decode_long", "decode_long_whole", "decode_tiled"]
ENCODES = ["encode_short", "encode_image", "encode_long", "encode_tiled"]


@pytest.fixture(scope="module")
def vae(golden):
    model = hunyuan_vae(golden.meta["config"])
    load_official(model, golden.weights)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def decoder(golden):
    model = HunyuanDecoder(golden.meta["config"]).eval().requires_grad_(False)
    own = {name: value for name, value in golden.weights.items() if name in model.state_dict()}
    load_official(model, own)
    return model


def tiles_of(case):
    if not case.get("tiling"):
        return tiling("whole" if case.get("framewise") is False else "diffusers", None, 4, 8)
    t = case["tiling"]
    sizes = [t[f"tile_sample_min_{axis}"] for axis in ("num_frames", "height", "width")]
    strides = [t[f"tile_sample_stride_{axis}"] for axis in ("num_frames", "height", "width")]
    return Tiling(
        *(Along(n // f, s // f, n - s, s) for n, s, f in zip(sizes, strides, (4, 8, 8), strict=True))
    )


@pytest.mark.parametrize("name", DECODES)
def test_decoding_in_tiles_equals_the_original(decoder, golden, name):
    case = golden.meta["cases"][name]
    source = case["z"] if isinstance(case["z"], str) else name
    z, tiles = golden.given(source)["z"], tiles_of(case)
    calls = []
    hook = decoder.register_forward_hook(lambda *_: calls.append(1))
    clips = list(decoder.decode_clips(z * decoder.scaling_factor, tiles))
    hook.remove()
    golden.close(torch.cat(clips, 2), golden.expected(name)["x"], name)
    assert len(calls) == count_tiles(*z.shape[2:], tiles)


@pytest.mark.parametrize("name", ENCODES)
def test_encoding_by_diffusers_equals_the_original(vae, golden, name):
    case = golden.meta["cases"][name]
    x = golden.given(name)["x"]
    if case.get("tiling"):
        vae.enable_tiling(**case["tiling"])
    try:
        moments = vae.encode(x).latent_dist
    finally:
        fresh = hunyuan_vae(golden.meta["config"])
        for key in list(vars(fresh)):
            if key.startswith(("tile_", "use_")):
                setattr(vae, key, getattr(fresh, key))
    golden.close(moments.mode(), golden.expected(name)["mode"], name)


def test_tencents_tiles_are_seventeen_latents_twelve_apart():
    tiles = tiling("tencent", 256, 4, 8)
    assert tiles == Tiling(Along(16, 12, 16, 48), Along(32, 24, 64, 192), Along(32, 24, 64, 192))
    assert count_tiles(33, 90, 160, tiles) == 3 * 4 * 7
    assert count_tiles(16, 32, 32, tiles) == 1
