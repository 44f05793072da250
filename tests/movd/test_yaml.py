"""The packaged configs have every key, each with a comment, and the page says what is in them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockstream.errors import ConfigError
from blockstream.run.config import OWN_KEYS, load_config
from movd.hunyuan.hunyuan_options import HunyuanOptions
from movd.options import MovdOptions
from movd.pyramid.pyramid_options import PyramidOptions
from movd.weights import Weights

ROOT = Path(__file__).parents[2]
FILES = {path.name: path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml"))}
OPTIONS = {"movd": MovdOptions, "hunyuan-video": HunyuanOptions, "pyramid-flow": PyramidOptions}
PAGES = {"movd": "movd.md", "hunyuan-video": "hunyuan.md", "pyramid-flow": "pyramid.md"}


def keys(text):
    """Return each top-level key with its comment, or the comment above its group."""
    found, above = {}, ""
    for line in text.splitlines():
        key = re.match(r"([a-z0-9_]+):[^#]*(#.*)?$", line)
        if key:
            found[key[1]] = key[2] or above
        elif line.startswith("#"):
            above = line
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_key_there_is_is_in_the_file(name):
    found = keys(FILES[name])
    pipeline = re.search(r"^pipeline: ([\w-]+)", FILES[name], re.MULTILINE)[1]
    assert set(found) == {*OWN_KEYS, *OPTIONS[pipeline].model_fields}


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_a_comment(name):
    found = keys(FILES[name])
    assert [key for key, comment in found.items() if key != "pipeline" and len(comment) < 12] == []


@pytest.mark.parametrize("pipeline", OPTIONS)
def test_every_key_is_on_the_page(pipeline):
    page = (ROOT / "docs" / PAGES[pipeline]).read_text()
    missing = [key for key in OPTIONS[pipeline].model_fields if f"`{key}`" not in page]
    assert not missing


def test_the_file_loads_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("movd.yaml")
    assert len(config.pipeline.options.texts) == 10
    assert load_config("movd", ["prompt=a blue star"]).pipeline.options.texts == ("a blue star",)


@pytest.mark.parametrize(
    ("name", "budget"), [("phone.yaml", "3.3GiB"), ("laptop.yaml", "8GiB"), ("gpu.yaml", "14GiB")]
)
def test_the_full_size_configs_load_from_anywhere_and_name_the_folder_that_is_not_there(
    name, budget, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert config.budget == budget
    with pytest.raises(ConfigError, match=r"t5\.path .*weights/t5-v1_1-xxl-\w+: does not exist"):
        Weights(config.pipeline.options)
    for part in ("t5", "dit", "vae"):  # folders in the working folder serve
        Path("weights", Path(getattr(config.pipeline.options, part).path).name).mkdir(parents=True)
    assert Path(load_config(name).pipeline.options.t5.path).parent == tmp_path / "weights"


def test_the_small_gpus_config_has_two_budgets():
    config = load_config("gpu.yaml")
    assert (config.device, config.device_budget) == ("cuda", "7.2GB")


def test_the_phones_video_is_the_papers():
    o = load_config("phone.yaml").pipeline.options
    assert (o.frames, o.size, o.steps, o.guidance) == (68, (256, 256), 30, 7.0)


@pytest.mark.skipif(not (ROOT / "movd" / "assets" / "tiny" / "dit").is_dir(), reason="no embedded weights")
def test_its_arena_is_smaller_than_its_weights():
    from blockstream.budget.amounts import parse_nbytes

    config = load_config("movd.yaml")
    weights = Weights(config.pipeline.options)
    assert parse_nbytes(config.arena) < weights.dit.checkpoint.nbytes


@pytest.mark.parametrize("words", [["plugins"], ["--help"], ["schema", "movd.yaml"], ["run", "--help"]])
def test_what_only_lists_imports_no_torch(words):
    code = (
        "import sys; from blockstream.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'transformers', 'diffusers', 'av', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_without_movd_the_engine_does_not_know_it_and_its_tests_pass():
    def run(*command):
        hidden = {**os.environ, "BLOCKSTREAM_DISABLE": "movd"}
        return subprocess.run(command, cwd=ROOT, env=hidden, check=False, capture_output=True, text=True)

    blockstream = [
        sys.executable,
        "-c",
        "import sys; from blockstream.cli.main import main; sys.exit(main())",
    ]
    assert re.search(r"movd .*hidden by BLOCKSTREAM_DISABLE", run(*blockstream, "plugins").stdout)
    refused = run(*blockstream, "run", "movd.yaml")
    assert refused.returncode == 2
    assert "plugin 'movd' is hidden" in refused.stderr
    tests = [
        "tests/run/test_runner.py",
        "tests/run/test_resume.py",
        "tests/run/test_config.py",
        "tests/plan/test_plan.py",
    ]
    done = run(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-2000:]
