"""A run computed from exported packages: streamed by the engine, and the video that torch makes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from blockstream.budget.amounts import parse_nbytes
from blockstream.errors import CheckpointError, ConfigError, SegmentLoadError
from blockstream.plugins.choices import Chosen
from blockstream.run import runner
from blockstream.run.config import load_config, make_config
from blockstream.verify.comparison import verify
from movd.text_to_video import pipeline
from movd_coreml import packaged
from tests.support.coreml import need_coremltools
from tests.support.interrupted import Passes

pytestmark = pytest.mark.timeout(900)  # exporting takes minutes where other work goes on

#: Holds two of the tiny model's largest segments, and a third of its weights.
ARENA = "5MiB"


@pytest.fixture(name="exported_tiny", scope="module")
def _exported_tiny(tmp_path_factory):
    """The embedded model for one small size."""
    need_coremltools()
    from movd_coreml.export import export

    return export(tiny(), tmp_path_factory.mktemp("export") / "tiny")


def tiny(**more):
    keys = {"prompt": "a red star moving left slowly", "height": 32, "width": 32, "frames": 17, "steps": 3}
    return make_config({"pipeline": "movd", "threads": 1, "cache": "off", **keys, **more})


def interpreter(export):
    return {"name": "coreml-interpreter", "packages": str(export.folder)}


@pytest.fixture(name="frames")
def _frames(monkeypatch):
    """What was given to the encoder, video by video."""
    made = []
    write = pipeline.write_video

    def keep(path, chunks, fps):
        made.append(list(chunks))
        return write(path, made[-1], fps)

    monkeypatch.setattr(pipeline, "write_video", keep)
    return made


def psnr(a, b):
    a, b = np.concatenate(a).astype(float), np.concatenate(b).astype(float)
    assert a.shape == b.shape
    error = ((a - b) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def test_the_embedded_models_video_comes_from_packages_in_an_arena_smaller_than_its_weights(
    exported_tiny, frames, tmp_path
):
    runner.run(tiny(), tmp_path / "torch")
    report = runner.run(tiny(backend=interpreter(exported_tiny), arena=ARENA), tmp_path / "packages")
    assert psnr(*frames) >= 45
    assert (tmp_path / "packages" / "video.mp4").stat().st_size > 0
    nbytes = {
        segment.name: exported_tiny.packages[segment.programs[0].package].nbytes
        for segment in exported_tiny.manifest.segments
    }
    assert sum(nbytes.values()) > 2 * parse_nbytes(ARENA)
    dit = next(stage for stage in report["stages"] if stage["name"] == "dit")
    assert dit["d"] < dit["b"]
    weights = sum(n for name, n in nbytes.items() if name.startswith("dit."))
    assert dit["read_nbytes"] > 1.5 * weights, "what is not retained is read in every pass"


def test_the_interpreter_computes_on_views_of_the_arena(exported_tiny, monkeypatch, tmp_path):
    from blockstream.streaming.session import Session

    places = set()

    def evaluate(function, inputs, blob, watch=None):
        for x in function.blobs:
            places.add(sessions[0]._tier.arena.address <= blob(x.offset, x.type.nbytes).data_ptr()
                       < sessions[0]._tier.arena.address + sessions[0]._tier.arena.nbytes)  # fmt: skip
        return original(function, inputs, blob, watch)

    sessions, original, start = [], packaged.evaluate, Session.start
    monkeypatch.setattr(Session, "start", lambda self: (sessions.append(self), start(self))[1])
    monkeypatch.setattr(packaged, "evaluate", evaluate)
    runner.run(tiny(backend=interpreter(exported_tiny), arena=ARENA, steps=1), tmp_path / "out")
    assert places == {True}


def test_what_is_retained_or_gathered_by_row_does_not_change_a_bit(
    exported_tiny, frames, monkeypatch, tmp_path
):
    from blockstream.module import partition
    from blockstream.module import row_tables as tables

    reads = []
    gather = tables.TableReader.gather

    def noted(self, ids):
        reads.append(ids.numel())
        return gather(self, ids)

    monkeypatch.setattr(tables.TableReader, "gather", noted)
    config = tiny(backend=interpreter(exported_tiny), arena=ARENA, steps=2)
    runner.run(config, tmp_path / "streamed")
    assert not reads
    monkeypatch.setattr(partition, "GATHER_NBYTES", 1024)
    runner.run(tiny(backend=interpreter(exported_tiny), arena="64MiB", steps=2), tmp_path / "retained")
    assert reads == [exported_tiny.manifest.text_tokens]
    assert all(np.array_equal(a, b) for a, b in zip(*frames, strict=True))
    lines = (tmp_path / "streamed" / "ledger.jsonl").read_text()
    for name in ('"pair.03"', '"block.01"', '"temporal.00"', '"spatial.01"'):
        assert name in lines, "segments are named as the manifest has them"


@pytest.fixture(name="small")
def _small(coreml_config):
    """Make a config of the small exported models, computed from packages where one is given."""

    def make(export=None, **more):
        backend = {} if export is None else {"backend": interpreter(export)}
        return coreml_config(cache="off", **backend, **more)

    return make


def close(a, b):
    """Return whether two videos are the same but for what int8 text weights change."""
    return psnr(a, b) > 30


def test_merged_tokens_and_a_shorter_last_chunk_come_from_packages(
    small, exported, frames, tmp_path, monkeypatch
):
    size = {"frames": 20, "height": 16, "width": 32}
    ran = []
    forward = packaged.PackagedSegment.forward

    def note(self, values, variant="plain"):
        ran.append((self.segment.stage, variant, self.programs[variant].function))
        return forward(self, values, variant)

    monkeypatch.setattr(packaged.PackagedSegment, "forward", note)
    runner.run(small(**size), tmp_path / "torch")
    assert not ran
    runner.run(small(exported, **size), tmp_path / "packages")
    assert close(*frames)
    pairs = [(variant, name) for stage, variant, name in ran if stage == "dit" and name.startswith("f")]
    assert {variant for variant, _ in pairs} == {"plain", "merged"}, "one step merges, the other does not"
    assert any(name.endswith("_merged") for _, name in pairs)
    assert {variant for stage, variant, _ in ran if stage == "vae-temporal"} == {"plain", "rest"}


def test_a_package_that_ranges_over_sizes_makes_a_video_of_one(small, exported_flexible, frames, tmp_path):
    size = {"height": 16, "width": 48}
    runner.run(small(**size), tmp_path / "torch")
    runner.run(small(exported_flexible, **size), tmp_path / "packages")
    assert close(*frames)


def test_a_video_begins_with_a_reference_though_packages_only_decode(small, exported, frames, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "first.png")
    for more in ({}, {"export": exported}):
        export = more.get("export")
        config = small(export, reference=str(tmp_path / "first.png"))
        runner.run(config, tmp_path / ("packages" if more else "torch"))
    assert close(*frames)


def test_a_finished_run_on_packages_is_not_computed_again(small, exported, tmp_path):
    passes = Passes()
    first = runner.run(small(exported), tmp_path / "out")
    again = runner.run(small(exported), tmp_path / "out", resume=True, observers=[passes])
    assert first["output"] == again["output"]
    assert not passes.of


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"height": 48}, "was not exported for 17x48x16; it has 17x16x16, 20x16x32"),
        ({"attention": []}, None),
        ({"attention": [{"name": "tdtm", "merge_steps": 2}]}, "was exported with attention"),
        ({"t5": {"dtype": "fp16"}}, "t5.dtype: packages hold their weights as they were exported"),
    ],
    ids=["size", "without merging", "other merging", "dtype"],
)
def test_what_packages_were_not_exported_for_is_refused_before_anything_is_written(
    small, exported, coreml_models, tmp_path, more, said
):
    if "t5" in more:
        more = {"t5": {**coreml_models["t5"], **more["t5"]}}
    if said is None:
        runner.run(small(exported, **more), tmp_path / "out")
        return
    with pytest.raises(ConfigError, match=said):
        runner.run(small(exported, **more), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_packages_of_another_model_are_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match="was exported from another t5"):
        runner.run(tiny(backend=interpreter(exported), height=16, width=16), tmp_path / "out")


def test_a_folder_without_packages_is_refused(tmp_path):
    backend = {"name": "coreml-interpreter", "packages": str(tmp_path)}
    with pytest.raises(ConfigError, match="holds no finished Core ML export"):
        runner.run(tiny(backend=backend), tmp_path / "out")


def test_packages_are_found_from_the_folder_of_the_config(tmp_path):
    text = "pipeline: movd\nprompt: a star\nbackend: {name: coreml-interpreter, packages: made}\n"
    (tmp_path / "movd.yaml").write_text(text)
    (tmp_path / "made").mkdir()
    config = load_config(tmp_path / "movd.yaml")
    assert config.backend.written()["packages"] == str(tmp_path / "made")


@pytest.fixture(name="copied")
def _copied(exported, tmp_path):
    """A copy of an export to be damaged."""
    shutil.copytree(exported.folder, tmp_path / "copy")
    return tmp_path / "copy"


def on(folder):
    return {"name": "coreml-interpreter", "packages": str(folder)}


def weight_file(folder, name="dit.pair.00"):
    return next((folder / "packages" / f"{name}.mlpackage").rglob("weight.bin"))


def test_a_weight_file_that_was_cut_is_named(coreml_config, copied, tmp_path):
    path = weight_file(copied)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"weight.bin: has \d+ bytes, exported were \d+"):
        runner.run(coreml_config(backend=on(copied)), tmp_path / "out")


def test_a_record_that_lies_is_named_before_anything_runs(coreml_config, copied, tmp_path):
    path = weight_file(copied)
    with path.open("r+b") as stream:
        stream.seek(64 + 8)
        stream.write((1 << 40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"weight.bin: the record of .* and the program declares"):
        runner.run(coreml_config(backend=on(copied)), tmp_path / "out")


@pytest.mark.parametrize("key", ["name", "shape"])
def test_a_manifest_that_does_not_describe_its_packages_is_refused(coreml_config, copied, tmp_path, key):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    (last,) = (segment for segment in manifest["segments"] if segment["name"] == "dit.last")
    for program in last["programs"]:
        program["inputs"][0][key] = {"name": "u", "shape": [2, 5, 1, 33]}[key]
    path.write_text(json.dumps(manifest))
    said = (
        r"dit.last.mlpackage: function '\S+' has x float32.*, and the manifest says .*do not belong together"
    )
    with pytest.raises(CheckpointError, match=said):
        runner.run(coreml_config(backend=on(copied)), tmp_path / "out")


def test_weights_that_change_while_they_are_used_end_the_run(coreml_config, copied, tmp_path):
    class Changes:
        from blockstream.plugins import hookimpl

        @hookimpl
        def stage_started(self, stage):
            if stage.name == "dit":
                for path in (copied / "packages").glob("vae*"):
                    weights = next(path.rglob("weight.bin"))
                    weights.write_bytes(weights.read_bytes() + b"\0")

    config = coreml_config(backend=on(copied), arena="300KiB", cache="off")
    with pytest.raises(SegmentLoadError, match="changed while it was in use: its size was"):
        runner.run(config, tmp_path / "out", observers=[Changes()])


def test_a_pipeline_refuses_a_backend_it_has_no_segments_for(coreml_config, tmp_path, monkeypatch):
    config = coreml_config(backend={"name": "coreml-interpreter", "packages": str(tmp_path)})
    build = Chosen.build
    none = SimpleNamespace(network=lambda stage, network, run: None)
    monkeypatch.setattr(Chosen, "build", lambda self: none if self.key == "backend" else build(self))
    said = "backend: coreml-interpreter: has no segments for stage 't5' of pipeline 'movd'"
    with pytest.raises(ConfigError, match=said):
        runner.run(config, tmp_path / "out")


def test_packages_streamed_are_bit_for_bit_packages_resident(exported_tiny):
    report = verify(tiny(backend=interpreter(exported_tiny), arena=ARENA, steps=1))
    assert report["equal"]
    assert {stage["how"] for stage in report["stages"]} == {"whole"}
