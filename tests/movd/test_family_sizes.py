"""What `synth` and `plan` know by name: the released networks' sizes, and tokenizers that can be read."""

import pytest

from movd.clip import CLIPTokenizer
from movd.hunyuan import hunyuan_plugin
from movd.hunyuan.llama import CROP, PromptTokenizer
from movd.pyramid import pyramid_plugin

SIZES = {
    "hunyuan-video-dit": 12_821_012_544,
    "hunyuan-video-vae": 246_478_803,
    "llava-llama-3-8b": 7_505_000_000,
    "clip-vit-l-text": 123_060_480,
    "pyramid-miniflux": 1_972_059_200,
    "pyramid-vae": 335_402_067,
}
FAMILIES = {f.name: f for p in (hunyuan_plugin, pyramid_plugin) for f in p.model_families()}


def test_every_family_has_its_size():
    assert FAMILIES.keys() == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_a_network_has_as_many_parameters_as_the_released_one(name):
    found = sum(p.numel() for p in FAMILIES[name].module().parameters())
    assert found == pytest.approx(SIZES[name], rel=1e-3 if name.startswith("llava") else 0)


@pytest.mark.parametrize("name", ["llava-llama-3-8b", "clip-vit-l-text"])
def test_synthetic_text_encoders_have_tokenizers(name, tmp_path):
    FAMILIES[name].write_extras(tmp_path)
    if name.startswith("clip"):
        assert CLIPTokenizer(tmp_path, 77).encode(["a fox"]).shape == (1, 77)
    else:
        ids, mask = PromptTokenizer(tmp_path, 128320).encode(["a fox"])
        assert ids.shape == mask.shape == (1, CROP + 256)
