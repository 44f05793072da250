"""Exports of the whole pipeline, evaluated from their files and compared with torch."""

import json
import shutil

import pytest
import torch
from torch import nn

from blockstream.errors import CheckpointError, ConfigError, ModelError
from blockstream.run.config import load_config
from movd_coreml import export as module
from movd_coreml.compare import Opened
from movd_coreml.convert import Form, convert
from movd_coreml.export import JOURNAL_NAME, Settings, export
from movd_coreml.int8 import dequantised, dequantised_half
from movd_coreml.manifest import MANIFEST_NAME, Program, describe_package, open_export
from movd_coreml.networks import Networks, What, parse_size
from movd_coreml.segments import tensor
from movd_coreml.verify import verify
from tests.support.coreml import need_coremltools
from tests.support.power_cut import recorded

#: Exports take a while where other processes compute.
pytestmark = pytest.mark.timeout(900)


def differing(report):
    return [c for c in (*report["functions"], *report["chains"]) if not c["equal"]]


def worst(report, **which):
    found = [c["error"] for c in report["functions"] if all(c[k] == v for k, v in which.items())]
    assert found
    return max(found)


def test_every_function_of_an_export_is_what_torch_computes(exported):
    report = verify(exported.folder)
    assert report["equal"], differing(report)
    made = exported.manifest
    functions = {(p.package, p.function) for s in made.segments for p in s.programs}
    assert {(c["package"], c["function"]) for c in report["functions"]} == functions
    assert {c["variant"] for c in report["functions"]} == {"plain", "merged", "rest"}
    assert {c["stage"] for c in report["chains"]} == {"t5", "dit", "vae-temporal", "vae-spatial"}
    assert max(c["error"] for c in report["functions"]) < 1e-4


def test_functions_of_a_segment_share_one_package(exported):
    for segment in exported.manifest.segments:
        assert len({program.package for program in segment.programs}) == 1
    pair = exported.segments["dit.pair.00"]
    assert {p.function for p in pair.programs} == {
        "f17x16x16",
        "f20x16x32",
        "f17x16x16_merged",
        "f20x16x32_merged",
    }
    (weights,) = (
        file.nbytes
        for file in exported.packages[pair.programs[0].package].files
        if file.path.endswith("weight.bin")
    )
    with Networks(load_config(exported.folder / "config.yaml"), What()) as networks:
        nbytes = networks.network("dit").nbytes(pair.modules)
    assert nbytes <= weights < 1.5 * nbytes


def test_int8_packages_hold_our_own_dequantised_weights(exported):
    blocks = [s for s in exported.manifest.segments if s.name.startswith("t5.block")]
    assert len(blocks) == 3 and all(segment.int8 for segment in blocks)
    report = verify(exported.folder)
    assert worst(report, segment="t5.block.00") < 1e-5
    assert not any(s.int8 for s in exported.manifest.segments if s.stage != "t5")


@pytest.mark.parametrize("target", ["iOS18", "iOS17"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_weights_of_a_product_are_ours_bit_for_bit(tmp_path, target, precision):
    """The identity goes through the product, so what comes out is the weight itself."""
    need_coremltools()
    layer = nn.Linear(24, 32, bias=False)
    form, x = Form(target, precision, int8=True), tensor("x", (24, 24))
    (shape,) = convert("s", layer, (x,), ("y",), form, tmp_path / "s.mlpackage")
    y = tensor("y", shape)
    with Opened(tmp_path / "s.mlpackage", Program(package="s", inputs=(x,), outputs=(y,))) as package:
        held = package({"x": torch.eye(24)})["y"].T
    with torch.no_grad():
        ours = (dequantised_half if precision == "fp16" else dequantised)(layer.weight)
    assert torch.equal(held, ours) and not torch.equal(held, layer.weight)


def test_flexible_half_precision_packages_are_what_torch_computes_at_every_size(exported_flexible):
    report = verify(exported_flexible.folder)
    assert report["equal"], differing(report)
    assert {c["preset"] for c in report["functions"]} == {"17x32x32", "17x16x48"}
    assert 1e-6 < worst(report, segment="dit.pair.00", variant="merged") < 3e-3
    assert worst(report, segment="t5.block.00") < 1e-4
    pair = exported_flexible.segments["dit.pair.00"]
    assert pair.precision == "fp16" and exported_flexible.segments["t5.block.00"].precision == "fp32"
    assert {program.function for program in pair.programs} == {"main"}, "before iOS 18 a package has one"
    (x,) = (t for t in pair.programs[0].inputs if t.value == "x")
    assert x.takes((2, 5, 3, 32)) and x.takes((2, 5, 4, 32)) and not x.takes((2, 5, 9, 32))


def test_a_manifest_says_all_an_app_needs(exported):
    made = exported.manifest
    assert [stage.name for stage in made.stages] == ["t5", "dit", "vae-temporal", "vae-spatial"]
    for stage in made.stages:
        for preset in made.presets:
            known = set(stage.inputs)
            for name in stage.order:
                program = exported.segments[name].program(preset.name)
                assert {t.value for t in program.inputs} <= known
                known |= {t.value for t in program.outputs}
            assert stage.output in known
    small, large = made.presets
    assert small.latent == (5, 2, 2) and large.latent == (6, 2, 4)
    assert large.chunks == ((17, 5), (3, 1)) and len(large.timesteps) == 2
    assert {table.name for table in made.tables} == {"t5.embedding", "dit.null_caption"}
    assert {file.path for file in made.files} == {"config.yaml", "tokenizer/spiece.model"}
    assert made.attention == ({**made.attention[0], "name": "tdtm", "merge_steps": 1},)


def test_exporting_the_same_again_converts_nothing(exported, coreml_config, monkeypatch):
    monkeypatch.setattr(module, "convert", lambda *a: pytest.fail("a segment was converted again"))
    before = (exported.folder / MANIFEST_NAME).read_bytes()
    settings = Settings(What(((17, 16, 16), (20, 16, 32))), Form("iOS18"), ("t5",))
    export(coreml_config(), exported.folder, settings)
    assert (exported.folder / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("more", "settings", "named"),
    [
        ({}, Settings(What(((17, 16, 16),))), "int8|presets"),
        ({}, Settings(What(((17, 16, 16), (20, 16, 32))), Form("iOS17"), ("t5",)), "target"),
        ({"attention": []}, Settings(What(((17, 16, 16), (20, 16, 32))), Form(), ("t5",)), "attention"),
    ],
)
def test_a_folder_with_another_export_is_refused(exported, coreml_config, more, settings, named):
    with pytest.raises(ConfigError, match=f"another ({named})"):
        export(coreml_config(**more), exported.folder, settings)


def test_a_stopped_export_goes_on_with_the_segment_it_was_at(coreml_config, tmp_path, monkeypatch):
    need_coremltools()
    out, converted = tmp_path / "out", []

    def convert(name, built, inputs, outputs, form, path):
        converted.append(name.split()[1])
        path.mkdir()
        (path / "weights").write_bytes(b"w" * 10)
        return [(1,)] * len(outputs)

    def stop(name, done, of):
        if name == "t5.block.01":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "convert", convert)
    monkeypatch.setattr(module, "join", lambda made, path: shutil.copytree(next(iter(made.values())), path))
    settings = Settings(What(((17, 16, 16),)))
    with pytest.raises(KeyboardInterrupt):
        export(coreml_config(), out, settings, stop)
    assert converted == ["t5.bias,", "t5.block.00,"]
    assert (out / JOURNAL_NAME).is_file() and not (out / MANIFEST_NAME).exists()
    with pytest.raises(ConfigError, match="no finished"):
        open_export(out)
    # What the journal lists must also be there.
    shutil.rmtree(out / "packages" / "t5.bias.mlpackage")
    converted.clear()
    with recorded(out, monkeypatch) as disk:
        made = export(coreml_config(), out, settings)
    assert not disk.early and "packages/t5.bias.mlpackage" in disk.renames
    assert not [name for name in disk.lost() if not name.startswith("packages/t5.block.00.")]  # synced before
    assert converted[0] == "t5.bias," and "t5.block.00," not in converted
    assert {s.name for s in made.manifest.segments} == {n for s in made.manifest.stages for n in s.order}
    left = {p.name for p in out.iterdir()}
    assert left == {"config.yaml", MANIFEST_NAME, "packages", "tables", "tokenizer"}


def test_a_folder_with_something_else_is_refused(coreml_config, tmp_path):
    need_coremltools()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        export(coreml_config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_operation_without_counterpart_is_named_with_its_module(tmp_path):
    need_coremltools()

    class Inner(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x) + 1

    with pytest.raises(ModelError, match=r"segment s: operation 'linalg_matrix_exp' in inner"):
        convert("segment s", Outer(), (tensor("x", (3, 3)),), ("y",), Form(), tmp_path / "x.mlpackage")
    assert not list(tmp_path.iterdir())


def test_sizes_are_frames_height_and_width():
    assert parse_size("51x256x448") == (51, 256, 448)
    for wrong in ("51x256", "51x256x0", "axbxc", "51X256X256"):
        with pytest.raises(ConfigError, match="FRAMESxHEIGHTxWIDTH"):
            parse_size(wrong)


def test_packages_of_other_weights_are_refused(exported, coreml_config, coreml_models, tmp_path):
    folder = tmp_path / "dit"
    shutil.copytree(coreml_models["dit"]["path"], folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="exported from another dit"):
        verify(exported.folder, coreml_config(dit={"path": str(folder)}))


@pytest.mark.parametrize("kind", ["weight.bin", "model.mlmodel"])
def test_an_edited_file_of_a_package_is_found_by_its_hash(exported, tmp_path, kind):
    folder = tmp_path / "copy"
    shutil.copytree(exported.folder, folder)
    path = next(p for p in sorted((folder / "packages").rglob(kind)) if "t5.block" in str(p))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{kind}.*hash"):
        verify(folder)


def test_a_package_with_other_weights_than_torch_is_told_apart(exported, tmp_path):
    """The comparison itself can fail: a weight is changed and the manifest with it."""
    folder = tmp_path / "copy"
    shutil.copytree(exported.folder, folder)
    path = next(p for p in sorted((folder / "packages").rglob("weight.bin")) if "dit.pair" in str(p))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = torch.full((16,), 0.5).numpy().tobytes()
    path.write_bytes(data)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for n, package in enumerate(manifest["packages"]):
        manifest["packages"][n] = describe_package(folder, package["path"]).model_dump(mode="json")
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    report = verify(folder)
    assert not report["equal"]
    assert {c["segment"] for c in report["functions"] if not c["equal"]} == {"dit.pair.00"}
