"""Small models and configs; no run draws or measures."""

from tests.support.movd_fixtures import config_fixture, models_fixture, own_cache, runs_undrawn

__all__ = ["config_fixture", "models_fixture", "own_cache", "runs_undrawn"]
