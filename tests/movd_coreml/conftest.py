"""Exports of small models of random weights, made once a session."""

import pytest

from blockstream.run.config import make_config
from tests.support.coreml import need_coremltools
from tests.support.movd_fixtures import config_fixture, models_fixture, own_cache, runs_undrawn
from tests.support.movd_models import write_dit, write_t5, write_vae

__all__ = ["config_fixture", "models_fixture", "own_cache", "runs_undrawn"]

TOKENS = 8


@pytest.fixture(name="coreml_models", scope="session")
def _models(tmp_path_factory):
    """The keys of a config that name the checkpoints: one block of a kind, wide enough for int8."""
    folder = tmp_path_factory.mktemp("coreml-models")
    write_t5(folder / "t5", d_model=32, d_ff=48, d_kv=8, num_heads=4, feed_forward_proj="gated-gelu")
    write_dit(folder / "dit", depth=1, caption_channels=32, model_max_length=TOKENS)
    temporal = {
        "filters": 4,
        "num_res_blocks": 1,
        "num_groups": 2,
        "channel_multipliers": [1, 2, 2],
        "temporal_downsample": [True, True],
    }
    write_vae(folder / "vae", temporal=temporal)
    return {part: {"path": str(folder / part)} for part in ("t5", "dit", "vae")}


@pytest.fixture(name="coreml_config", scope="session")
def _config(coreml_models):
    """Make a config of these models: 17 frames of 16 x 16 pixels, token merging."""

    def make(**more):
        keys = {
            "pipeline": "movd",
            "prompt": "a red star",
            "height": 16,
            "width": 16,
            "frames": 17,
            "steps": 2,
            "threads": 1,
            "attention": [{"name": "tdtm", "merge_steps": 1}],
            **coreml_models,
            **more,
        }
        return make_config(keys)

    return make


@pytest.fixture(name="exported", scope="session")
def _exported(coreml_config, tmp_path_factory):
    """Two presets, one with a shorter last chunk; float32, T5 in int8, functions joined in one package."""
    need_coremltools()
    from movd_coreml.convert import Form
    from movd_coreml.export import Settings, export
    from movd_coreml.networks import What

    settings = Settings(What(((17, 16, 16), (20, 16, 32))), Form("iOS18"), ("t5",))
    return export(coreml_config(), tmp_path_factory.mktemp("export") / "a", settings)


@pytest.fixture(name="exported_flexible", scope="session")
def _exported_flexible(coreml_config, tmp_path_factory):
    """The same two sizes by functions that range over both; STDiT3 in half precision, an older target."""
    need_coremltools()
    from movd_coreml.convert import Form
    from movd_coreml.export import Settings, export
    from movd_coreml.networks import What

    what = What(((17, 32, 32), (17, 16, 48)), flexible=True)
    out = tmp_path_factory.mktemp("export") / "b"
    return export(coreml_config(), out, Settings(what, Form("iOS17", "fp16")))
