"""Small models of random weights in the official layouts, written once, and configs that name them."""

import pytest

from blockstream.run import drawing, folder, runner
from blockstream.run.config import make_config
from tests.support.movd_models import write_models


@pytest.fixture(name="models", scope="session")
def models_fixture(tmp_path_factory):
    """The keys of a config that name the checkpoints."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="package")
def runs_undrawn():
    """Runs neither measure the disk nor draw: that takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        for drawn_by in (drawing, folder):
            patch.setattr(drawn_by, "draw_finished", lambda path: None)
        patch.setattr(runner, "disk_account", lambda stages, wall_s: {})
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="config", scope="session")
def config_fixture(models):
    """Make a config of small videos: 17 frames of 16 x 16 pixels, two steps."""

    def make(**more):
        keys = {
            "pipeline": "movd",
            "height": 16,
            "width": 16,
            "frames": 17,
            "steps": 2,
            "threads": 1,
            "arena": "640KiB",
            **models,
            **more,
        }
        if not more.keys() & {"prompt", "prompts"}:
            keys["prompt"] = "a red star moving left slowly"
        return make_config({key: value for key, value in keys.items() if value is not None})

    return make
