"""Packages as their authors ship them: built as wheels, installed where nothing else is, run, and removed."""

from __future__ import annotations

import pytest

from blockstream.cli.new_plugin import write
from blockstream.cli.plugin_templates import KINDS
from tests.support import wheels
from tests.support.imports import ROOT

EXAMPLE = ROOT / "examples" / "http_backend"


@pytest.fixture(name="built", scope="module")
def _built(tmp_path_factory):
    """A new package of each kind and the example of a backend, by folder: their wheels; and the site."""
    folder = tmp_path_factory.mktemp("built")
    sources = [write(f"my-{kind}", kind, folder) for kind in sorted(KINDS)]
    made = dict(zip([*sources, EXAMPLE], wheels.build([*sources, EXAMPLE], folder / "wheels"), strict=True))
    for wheel in made.values():
        wheels.install(wheel, folder / "site")
    return made, folder / "site"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_package_passes_its_own_tests_once_it_is_installed(built, tmp_path):
    """Those of the example ask a server on 127.0.0.1, which fails in every way there is."""
    made, site = built
    tests = [source / "tests" for source in made]
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
    done = wheels.call("-m", "pytest", *options, *tests, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_installed_is_listed_and_what_is_removed_is_missed_by_its_name(built, tmp_path):
    made, site = built
    config = tmp_path / "mine.yaml"
    config.write_text("pipeline: my-pipeline\nmodel: weights\n")
    listed = wheels.blockstream("plugins", site=site, cwd=tmp_path)
    assert all(f"my-{kind}" in listed.stdout for kind in KINDS), listed.stdout + listed.stderr
    assert wheels.blockstream("schema", config, site=site, cwd=tmp_path).returncode == 0
    for wheel in made.values():
        wheels.remove(wheel, site)
    assert not list(site.iterdir())
    gone = wheels.blockstream("schema", config, site=site, cwd=tmp_path)
    assert (gone.returncode, "no pipeline 'my-pipeline'" in gone.stderr) == (2, True)
