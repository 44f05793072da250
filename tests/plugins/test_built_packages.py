"""Packages as their authors ship them: built as wheels, installed where nothing else is, run, and removed."""

from __future__ import annotations

import pytest

from tests.support import wheels
from tests.support.imports import ROOT

EXAMPLE = ROOT / "examples" / "http_backend"


@pytest.fixture(name="site", scope="module")
def _site(tmp_path_factory):
    """A folder into which the example of a backend is installed from its wheel."""
    folder = tmp_path_factory.mktemp("built")
    (wheel,) = wheels.build([EXAMPLE], folder / "wheels")
    wheels.install(wheel, folder / "site")
    return folder / "site"


def test_weights_read_from_a_server_are_bit_for_bit_those_of_the_disk(site, tmp_path):
    """The tests of the example: a server on 127.0.0.1 that fails in every way there is."""
    pytest_ = ("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", EXAMPLE / "tests")
    done = wheels.call(*pytest_, f"--rootdir={tmp_path}", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
