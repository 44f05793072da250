"""A T5 packed as int8 in a whole run: streamed as resident, near the original, refused without its scales."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from blockstream.cli.main import main
from blockstream.errors import CheckpointError, ConfigError
from blockstream.run import runner
from blockstream.verify.comparison import verify
from movd.weights import Weights
from tests.support.movd_models import DIT, T5, VAE


@pytest.fixture
def packed(models, tmp_path):
    """The keys of a config whose T5 is a pack in int8."""
    source, folder = Path(models["t5"]["path"]), tmp_path / "t5-int8"
    named = {**json.loads((source / "config.json").read_text()), "architectures": ["T5EncoderModel"]}
    (tmp_path / "config.json").write_text(json.dumps(named))
    model = ["--model", str(tmp_path / "config.json")]
    assert main(["pack", str(source), str(folder), "--dtype", "int8", *model]) == 0
    return {"t5": {"path": str(folder)}}


def test_a_run_with_int8_streams_as_it_runs_in_memory(config, packed):
    for by_segment in (False, True):
        report = verify(config(**packed, frames=1), by_segment=by_segment)
        assert report["difference"] is None
        assert [s["name"] for s in report["stages"]] == ["t5", "dit", "vae"]


@pytest.mark.parametrize("product", ["bf16", "fp32"])
def test_its_latents_are_near_those_of_the_original(config, packed, product, tmp_path):
    runner.run(config(frames=1), tmp_path / "a")
    runner.run(config(**packed, frames=1, int8=product), tmp_path / "b")
    assert f"int8: {product}\n" in (tmp_path / "b" / "config.yaml").read_text()
    a, b = (load_file(tmp_path / x / "latents.safetensors") for x in "ab")
    (key,) = a
    apart = float((a[key] - b[key]).norm() / a[key].norm())
    assert 0 < apart < 0.05


def test_embeddings_of_another_product_are_not_taken_from_the_cache(config, packed, tmp_path):
    runner.run(config(**packed, frames=1, int8="fp32"), tmp_path / "a")
    again = runner.run(config(**packed, frames=1, int8="fp32"), tmp_path / "b")
    other = runner.run(config(**packed, frames=1, int8="bf16"), tmp_path / "c")
    assert [s["name"] for s in again["stages"]] == ["dit", "vae"]
    assert [s["name"] for s in other["stages"]] == ["t5", "dit", "vae"]


def test_the_pack_of_another_model_is_refused_by_its_keys(config, packed, models):
    folder = packed["t5"]["path"]
    with pytest.raises(Exception, match=r"dit\.path .*t5-int8"):
        Weights(config(dit={"path": folder}).pipeline.options).denoiser()


def test_a_pack_that_lacks_scales_is_refused(config, packed, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "edited"
    folder.mkdir()
    tensors = {}
    for path in sorted((tmp_path / "t5-int8").glob("*.safetensors")):
        tensors |= load_file(path)
    name = next(n for n in tensors if n.endswith("_scale"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    for small in ("config.json", "spiece.model"):
        (folder / small).write_bytes((tmp_path / "t5-int8" / small).read_bytes())
    with pytest.raises(CheckpointError, match=f"is int8 and has no '{name}'"):
        runner.run(config(t5={"path": str(folder)}), tmp_path / "out")


def test_a_folder_that_is_named_int8_and_is_not_says_how_to_make_it(config, models):
    options = config(t5={**models["t5"], "dtype": "int8"}).pipeline.options
    with pytest.raises(
        CheckpointError, match=r"holds no weights in int8; `blockstream pack .* --dtype int8`"
    ):
        Weights(options).text_encoder()


def test_a_pack_that_is_named_int8_is_taken_as_it_is(config, packed, tmp_path):
    named = {"t5": {**packed["t5"], "dtype": "int8"}}
    a = runner.run(config(**packed, frames=1, cache="off"), tmp_path / "a")
    b = runner.run(config(**named, frames=1, cache="off"), tmp_path / "b")
    assert a["stages"][0]["read_nbytes"] == b["stages"][0]["read_nbytes"]
    x, y = (load_file(tmp_path / n / "latents.safetensors") for n in "ab")
    assert all((x[k] == y[k]).all() for k in x)


def test_folders_that_are_not_there_are_planned_as_released(config, tmp_path, monkeypatch, caplog):
    small = {"t5": {**T5, "architectures": ["T5EncoderModel"]}, "dit": DIT, "vae": VAE}
    monkeypatch.setattr("movd.weights.RELEASED", small)
    missing = {part: {"path": str(tmp_path / part), "dtype": "fp32"} for part in small}
    missing["t5"]["dtype"] = "int8"
    made = config(**missing, budget="4GiB")
    plan = runner.plan(made)
    assert [s["name"] for s in plan["stages"]] == ["t5", "dit", "vae"]
    assert caplog.text.count("does not exist: planned with the released network") == 3
    there = runner.plan(config(budget="4GiB"))
    sizes = [[s["nbytes"] for s in p["stages"]] for p in (plan, there)]
    assert sizes[0][0] < sizes[1][0]  # int8
    assert sizes[0][1] == pytest.approx(sizes[1][1], rel=0.1)
    assert not any((tmp_path / part).exists() for part in small)
    with pytest.raises(ConfigError, match="does not exist; name the folder"):
        runner.run(made, tmp_path / "out")
