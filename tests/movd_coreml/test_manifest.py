"""The manifest of an export: read whole or refused by name."""

import json

import pytest

from blockstream.errors import CheckpointError, ConfigError
from movd_coreml.manifest import (
    MANIFEST_NAME,
    Manifest,
    Preset,
    Program,
    Segment,
    Stage,
    Table,
    Tensor,
    describe_package,
    file_sha256,
    open_export,
)


def preset(name="17x16x16"):
    frames, height, width = map(int, name.split("x"))
    return Preset(
        name=name,
        frames=frames,
        height=height,
        width=width,
        latent=(5, height // 8, width // 8),
        chunks=((17, 5),),
        frames_a_call=4,
        timesteps=(1000.0, 500.0),
    )


def write(folder):
    """Write an export of one segment with two programs, and of one table."""
    package = folder / "packages" / "s.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    (package / "Data" / "weight.bin").write_bytes(b"w" * 100)
    (folder / "table.f32").write_bytes(bytes(16))
    x = Tensor(name="x", value="x", shape=(1, 4))
    out = Tensor(name="x_out", value="x", shape=(1, 4))

    def program(**more):
        return Program(package="packages/s.mlpackage", inputs=(x,), outputs=(out,), **more)

    programs = (
        program(function="a", presets=("17x16x16",)),
        program(function="b", presets=("17x16x32",)),
        program(function="c", variant="merged", presets=("17x16x32",)),
    )
    table = Table(name="t", path="table.f32", shape=(4,), nbytes=16, sha256=file_sha256(folder / "table.f32"))
    manifest = Manifest(
        model={"t5": "1", "dit": "2", "vae": "3"},
        target="iOS18",
        precision="fp32",
        int8=(),
        text_tokens=8,
        guidance=7.0,
        fps=24.0,
        presets=(preset(), preset("17x16x32")),
        stages=(Stage(name="dit", order=("s",), inputs=("x",), output="x"),),
        segments=(Segment(name="s", stage="dit", modules=("blocks.0",), programs=programs),),
        packages=(describe_package(folder, "packages/s.mlpackage"),),
        tables=(table,),
        files=(),
        tools={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


@pytest.fixture(name="folder")
def _folder(tmp_path):
    write(tmp_path)
    return tmp_path


def edited(folder, **values):
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **values}))


def test_a_manifest_is_read_as_it_was_written(folder):
    export = open_export(folder)
    export.check_files()
    assert export.manifest.model_dump_json() == (folder / MANIFEST_NAME).read_text()
    assert export.preset_for(17, 16, 32).latent == (5, 2, 4)
    assert export.table("t").shape == (4,)


def test_a_segment_has_a_program_for_each_preset_and_variant(folder):
    segment = open_export(folder).segments["s"]
    assert segment.program("17x16x16").function == "a"
    assert segment.program("17x16x32").function == "b"
    assert segment.program("17x16x32", "merged").function == "c"
    assert segment.program("17x16x16", "merged").function == "a", "a segment without the variant"
    with pytest.raises(ConfigError, match=r"no program for preset '51x16x16' \(17x16x16, 17x16x32\)"):
        segment.program("51x16x16")


def test_a_size_that_was_not_exported_names_those_that_were(folder):
    with pytest.raises(ConfigError, match=r"51x64x64; it has 17x16x16, 17x16x32.*--preset 51x64x64"):
        open_export(folder).preset_for(51, 64, 64)


def test_packages_of_another_model_are_refused_by_the_part_that_differs(folder):
    export = open_export(folder)
    export.require_model({"t5": "1", "dit": "2", "vae": "3"})
    with pytest.raises(ConfigError, match=r"another vae \(3\) than the config names \(9\)"):
        export.require_model({"t5": "1", "dit": "2", "vae": "9"})


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="blockstream export coreml"):
        open_export(tmp_path)


def test_a_file_that_was_cut_is_found_on_opening(folder):
    path = folder / "packages" / "s.mlpackage" / "Data" / "weight.bin"
    path.write_bytes(b"w" * 60)
    with pytest.raises(CheckpointError, match=r"weight\.bin: has 60 bytes, exported were 100"):
        open_export(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"weight\.bin: is missing"):
        open_export(folder)


@pytest.mark.parametrize("file", ["packages/s.mlpackage/Data/weight.bin", "table.f32"])
def test_a_file_that_was_edited_is_found_by_its_hash(folder, file):
    path = folder / file
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    export = open_export(folder)
    with pytest.raises(CheckpointError, match=f"{path.name}: is not what was exported"):
        export.check_files()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"format": "other"}, ConfigError, "no manifest of a Core ML export"),
        ({"version": 9}, ConfigError, "has version 9, this program reads 1"),
        ({"precision": "fp8"}, CheckpointError, "precision"),
        ({"extra": 1}, CheckpointError, "extra"),
        ({"packages": []}, CheckpointError, r"names packages/s\.mlpackage, which it does not hold"),
        ({"segments": []}, CheckpointError, "names s, which it does not hold"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused_by_name(folder, values, kind, message):
    edited(folder, **values)
    with pytest.raises(kind, match=message):
        open_export(folder)


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "C:\\x"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(folder, name):
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["tables"][0]["path"] = name
    edited(folder, **manifest)
    with pytest.raises(CheckpointError, match="only files inside its own folder"):
        open_export(folder)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_export(folder)


def test_the_hash_of_a_package_leaves_out_what_is_random(folder):
    before = describe_package(folder, "packages/s.mlpackage").sha256
    (folder / "packages" / "s.mlpackage" / "Manifest.json").write_text('{"id": 7}')
    assert describe_package(folder, "packages/s.mlpackage").sha256 == before
    (folder / "packages" / "s.mlpackage" / "Data" / "weight.bin").write_bytes(b"v" * 100)
    assert describe_package(folder, "packages/s.mlpackage").sha256 != before


def test_ranges_say_which_shapes_are_taken():
    fixed = Tensor(name="x", value="x", shape=(2, 4))
    ranged = Tensor(name="x", value="x", shape=(2, 4), ranges=((1, 3, 6),))
    assert fixed.takes((2, 4)) and not fixed.takes((2, 5)) and not fixed.takes((2, 4, 1))
    assert ranged.takes((2, 3)) and ranged.takes((2, 6))
    assert not ranged.takes((2, 7)) and not ranged.takes((3, 4))
