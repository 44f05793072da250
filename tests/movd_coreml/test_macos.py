"""What is done with Core ML, seen from a runtime that stands in for it: Core ML itself is not tested here."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError, ModelError, SegmentLoadError
from blockstream.plugins import Network
from blockstream.run import runner
from movd_coreml import macos
from movd_coreml.compiled import UNITS, CompiledPackages, CoreML
from movd_coreml.interpreter import Package, evaluate
from movd_coreml.macos import TOLERANCE, difference

pytestmark = pytest.mark.timeout(900)  # exporting takes minutes where other work goes on


class Runtime:
    """Compiles by copying and predicts by evaluating; counts what is asked of it and what is in memory."""

    version = "coremltools 9.0, macOS 26.0"

    def __init__(self):
        self.compiled, self.loaded, self.units = [], [], set()
        self.live = self.most = 0
        self.off = 0.0

    def compile(self, package, to):
        assert not to.exists()
        self.compiled.append(package.name)
        shutil.copytree(package, to)

    def load(self, compiled, units, function):
        self.loaded.append((compiled.name, function))
        self.units.add(units)
        return Model(self, compiled, function)


class Model:
    def __init__(self, runtime, compiled, function):
        assert (compiled / "Manifest.json").is_file(), "what is loaded is whole"
        self.runtime, self.package = runtime, Package.open(compiled)
        self.function = self.package.function(function)
        runtime.live += 1
        runtime.most = max(runtime.most, runtime.live)

    def predict(self, inputs):
        assert all(isinstance(value, np.ndarray) for value in inputs.values())
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with self.package.weights(self.function) as weights:
            made = evaluate(self.function, given, weights)
        return {name: value.numpy() + np.float32(self.runtime.off) for name, value in made.items()}

    def __del__(self):
        self.runtime.live -= 1


@pytest.fixture(name="runtime")
def _runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(macos, "CoreML", lambda: runtime)
    return runtime


@pytest.fixture(name="config")
def _config(coreml_config, exported):
    def make(name="coreml", **more):
        backend = {"name": name, "packages": str(exported.folder), **more.pop("options", {})}
        return coreml_config(backend=backend, cache="off", **more)

    return make


def test_packages_are_compiled_and_compared_once_and_loaded_and_released_by_visit(
    config, runtime, exported, own_cache, monkeypatch, tmp_path
):
    report = runner.run(config(), tmp_path / "first")
    assert {stage["name"] for stage in report["stages"]} == {"t5", "dit", "vae"}
    packages = sorted({p.package.split("/")[-1] for s in exported.manifest.segments for p in s.programs})
    assert sorted(runtime.compiled) == packages
    assert runtime.live == 0, "nothing stays loaded after a run"
    assert len(runtime.loaded) >= len(packages)
    merged = [name for _, name in runtime.loaded if name and name.endswith("_merged")]
    assert merged, "the step that merges loads the merged function"
    notes = list((own_cache / "movd" / "coreml").glob("*.checked.json"))
    assert len(notes) == len(packages)
    assert all(error == 0 for path in notes for error in json.loads(path.read_text()).values())
    compared = []
    monkeypatch.setattr(macos, "evaluate", lambda *args: compared.append(args))
    runner.run(config(), tmp_path / "second")
    assert sorted(runtime.compiled) == packages, "a second run compiles nothing"
    assert not compared, "and compares nothing"


def test_segments_come_and_go_where_the_arena_holds_two(config, runtime, tmp_path):
    runner.run(config(arena="320KiB", options={"check": False}), tmp_path / "out")
    assert len(runtime.loaded) > len(runtime.compiled), "what is not retained is loaded for each visit"
    assert 2 <= runtime.most < len(runtime.compiled)
    assert runtime.live == 0


def test_a_run_on_core_ml_gives_what_the_interpreter_gives(config, runtime, tmp_path):
    runner.run(config(options={"check": False}), tmp_path / "coreml")
    runner.run(config("coreml-interpreter"), tmp_path / "interpreter")
    videos = [(tmp_path / name / "video.mp4").read_bytes() for name in ("coreml", "interpreter")]
    assert videos[0] == videos[1]


def test_a_prediction_that_is_another_result_ends_the_run(config, runtime, tmp_path):
    runtime.off = 1.0
    with pytest.raises(ModelError, match=r"t5.*Core ML's first prediction differs from the interpreter's by"):
        runner.run(config(steps=1), tmp_path / "out")
    runner.run(config(options={"check": False}, steps=1), tmp_path / "unchecked")


def test_operations_are_counted_without_core_ml(config, runtime, exported):
    from blockstream.module.rehearsal import rehearse

    made = config(attention=[])
    run = SimpleNamespace(config=made, planning=False, checkpoint=Checkpoint.open)
    network = made.backend.build().network("t5", Network(None, exported.folder), run)
    tokens = torch.ones(1, exported.manifest.text_tokens, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    flops = rehearse(network.module, inputs).flops
    assert flops["block.00"] > 0
    assert not runtime.loaded


def test_what_core_ml_raises_names_the_segment(config, runtime, tmp_path, monkeypatch):
    def load(compiled, units, function):
        raise RuntimeError("E5RT encountered an STL exception")

    monkeypatch.setattr(runtime, "load", load)
    with pytest.raises(SegmentLoadError, match=r"Core ML could not load it: E5RT .* try other compute_units"):
        runner.run(config(), tmp_path / "out")
    assert runtime.live == 0


@pytest.mark.parametrize("units", UNITS)
def test_compute_units_are_the_users_choice(config, runtime, tmp_path, units):
    backend = config(options={"compute_units": units}).backend.build()
    assert backend.compiled.units == units


def test_other_compute_units_are_refused(config):
    with pytest.raises(ConfigError, match="compute_units"):
        config(options={"compute_units": "neural"})


def test_compiled_packages_are_named_by_content_versions_and_units(exported, tmp_path):
    package = exported.manifest.packages[0].path
    runtime = Runtime()
    first = CompiledPackages(exported, runtime, "cpu", tmp_path).path(package)
    assert CompiledPackages(exported, runtime, "cpu", tmp_path).path(package) == first
    others = [CompiledPackages(exported, runtime, "all", tmp_path).path(package)]
    runtime.version = "coremltools 9.0, macOS 26.1"
    others.append(CompiledPackages(exported, runtime, "cpu", tmp_path).path(package))
    assert len({first, *others}) == 3
    assert first.suffix == ".mlmodelc"


def test_a_compilation_that_fails_leaves_nothing(exported, tmp_path):
    class Fails(Runtime):
        def compile(self, package, to):
            super().compile(package, to)
            raise RuntimeError("no space")

    compiled = CompiledPackages(exported, Fails(), "cpu", tmp_path / "compiled")
    with pytest.raises(RuntimeError, match="no space"):
        compiled.path(exported.manifest.packages[0].path)
    assert not list((tmp_path / "compiled").iterdir())


def test_another_process_may_have_compiled_it_meanwhile(exported, tmp_path):
    class Slow(Runtime):
        def compile(self, package, to):
            super().compile(package, to)
            if not self.loaded:
                self.loaded.append("now")
                other.path(exported.manifest.packages[0].path)

    other = CompiledPackages(exported, Runtime(), "cpu", tmp_path)
    package = exported.manifest.packages[0].path
    assert CompiledPackages(exported, Slow(), "cpu", tmp_path).path(package) == other.path(package)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_package_that_is_not_what_was_exported_is_not_compiled(exported, tmp_path):
    from movd_coreml.manifest import open_export

    shutil.copytree(exported.folder, tmp_path / "copy")
    copy = open_export(tmp_path / "copy")
    package = copy.manifest.packages[0].path
    weights = next((tmp_path / "copy" / package).rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was exported"):
        CompiledPackages(copy, Runtime(), "cpu", tmp_path / "compiled").path(package)


def test_on_other_systems_the_backend_names_the_one_that_works(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ConfigError, match=r"needs macOS, this is .*; coreml-interpreter computes the same"):
        CoreML()


def test_core_ml_is_called_as_coremltools_has_it(monkeypatch, tmp_path):
    calls = []

    class Tools:
        __version__ = "9.0"

        class ComputeUnit:
            CPU_AND_GPU = "gpu"

        class models:  # noqa: N801
            class utils:  # noqa: N801
                @staticmethod
                def compile_model(package, to):
                    calls.append(("compile", package, to))

            @staticmethod
            def CompiledMLModel(path, units, function):
                calls.append(("load", path, units, function))
                return "model"

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("movd_coreml.tools.coremltools", lambda: Tools)
    runtime = CoreML()
    assert runtime.version.startswith("coremltools 9.0, macOS")
    runtime.compile(tmp_path / "a.mlpackage", tmp_path / "a.mlmodelc")
    assert runtime.load(tmp_path / "a.mlmodelc", "cpu-and-gpu", None) == "model"
    assert calls == [
        ("compile", str(tmp_path / "a.mlpackage"), str(tmp_path / "a.mlmodelc")),
        ("load", str(tmp_path / "a.mlmodelc"), "gpu", None),
    ]


def test_coremltools_itself_has_these_names():
    from movd_coreml.tools import available, coremltools

    if not available():
        pytest.skip("coremltools is not installed")
    tools = coremltools()
    assert all(hasattr(tools.ComputeUnit, name) for name in UNITS.values())
    assert tools.models.CompiledMLModel.__init__.__code__.co_varnames[:4] == (
        "self",
        "path",
        "compute_units",
        "function_name",
    )
    assert tools.models.utils.compile_model.__code__.co_varnames[:2] == ("model", "destination_path")


@pytest.mark.parametrize(
    ("found", "error"),
    [([1.0, 2.0], 0.0), ([1.0, 2.2], 0.1), ([1.0, float("nan")], float("inf")), ([1.0], float("inf"))],
)
def test_a_difference_is_relative_to_the_largest_number(found, error):
    assert difference(torch.tensor(found), torch.tensor([1.0, 2.0])) == pytest.approx(error)
    assert TOLERANCE["fp32"] < TOLERANCE["fp16"]
