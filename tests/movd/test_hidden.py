"""`BLOCKSTREAM_DISABLE=movd` runs everything else as if movd were not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockstream.errors import ConfigError
from blockstream.plugins import Plugins, entrypoints
from blockstream.run.config import make_config, read_config


@pytest.fixture(autouse=True)
def hidden(monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "movd")


def test_its_pipeline_is_refused_saying_why():
    with pytest.raises(ConfigError, match="'movd' is hidden by BLOCKSTREAM_DISABLE"):
        make_config(read_config("movd.yaml", []))


def test_its_model_families_are_unknown():
    plugins = Plugins()
    assert "movd" not in plugins.visible
    for family in ("stdit3-xl-2", "opensora-vae", "t5-v1_1-xxl"):
        with pytest.raises(ConfigError, match=f"no model family '{family}'"):
            plugins.family(family)
    assert "movd" not in plugins.loaded


def test_its_commands_are_gone():
    assert not [c for c in entrypoints.commands() if c.package == "movd"]


def test_nothing_of_it_is_imported_by_listing_all_there_is():
    program = (
        "import sys; from blockstream.cli.main import main\n"
        "assert main(['plugins', '--hooks']) == 0\n"
        "sys.exit(any(m.partition('.')[0] == 'movd' for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "movd" in done.stdout and "(hidden by BLOCKSTREAM_DISABLE)" in done.stdout
