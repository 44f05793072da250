"""The example plugin is installed as anyone's, used by a config, and missed by name when it is gone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "third_party_plugin"


def call(*argv, site, cwd):
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed a copy of the example."""
    folder = tmp_path_factory.mktemp("site")
    copy = folder / "source"
    shutil.copytree(EXAMPLE, copy)
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    done = call(*pip, "--target", folder / "installed", copy, site=folder, cwd=folder)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("building a package needs setuptools here")
    assert done.returncode == 0, done.stderr
    return folder / "installed"


def blockstream(*argv, site, cwd):
    program = "import sys; from blockstream.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return call("-c", program, *argv, site=site, cwd=cwd)


def test_the_installed_examples_own_tests_pass(site, tmp_path):
    pytest_ = ("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", EXAMPLE / "tests")
    done = call(*pytest_, f"--rootdir={tmp_path}", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_config_uses_all_three_of_its_hooks(site, tmp_path):
    done = blockstream("run", EXAMPLE / "trio.yaml", "--out", "out", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reads = (tmp_path / "out" / "reads.csv").read_text().splitlines()
    assert reads[0] == "segment,reads,bytes,seconds"
    counts = {row.split(",")[0]: int(row.split(",")[1]) for row in reads[1:]}
    resolved = (tmp_path / "out" / "config.yaml").read_text()
    assert "trio:ab2" in resolved and "trio:every" in resolved
    # One segment of three is read once in 6 passes; the others once a pass.
    blocks = [n for label, n in counts.items() if "_blocks." in label]
    assert {1, 6} <= set(blocks)


def test_without_the_package_the_config_is_refused_by_the_plugins_name(tmp_path):
    done = blockstream("run", EXAMPLE / "trio.yaml", "--out", "out", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "no plugin 'trio' is installed" in done.stderr
    assert not (tmp_path / "out").exists()
