"""The config's backend is asked for every stage of any pipeline, and nothing is read past it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockstream.checkpoint import Checkpoint
from blockstream.engine.store import Whole
from blockstream.errors import ConfigError, PluginError, SegmentLoadError
from blockstream.plugins.choices import Choice, Chosen
from blockstream.run import drawing, runner
from blockstream.verify.comparison import verify
from tests.support.elsewhere import Elsewhere, Memory
from tests.support.toy_pipeline import ToyPipeline, config, save


@pytest.fixture(name="toy")
def _toy(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "draw_finished", lambda folder: None)
    return ToyPipeline(save(tmp_path / "toy"))


def backed(toy, backend, **more):
    """Return a config of the toy pipeline with an object for its backend."""
    chosen = Chosen("backend", "mine", "builtin", Choice("mine", lambda _: backend))
    return config(toy, backend=chosen, **more)


@pytest.fixture(name="memory")
def _memory(toy):
    """The toy's weights in memory; the files that are left have the same headers, and other numbers."""
    held = Memory(toy.folder)
    for path in toy.folder.rglob("*.safetensors"):
        save_file({k: torch.full_like(v, 3.0) for k, v in load_file(path).items()}, path, {"pad": "x" * 5})
    return held


def made(toy, tmp_path, **more):
    torch.manual_seed(1)
    return runner.run(config(toy, **more), tmp_path / f"out{len(list(tmp_path.iterdir()))}")["output"]["sum"]


def test_headers_buffers_tables_and_segments_come_through_the_backend(toy, tmp_path):
    wanted = made(toy, tmp_path)
    memory = Memory(toy.folder)
    for path in toy.folder.rglob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: torch.full_like(v, 3.0) for k, v in tensors.items()}, path, {"pad": "x" * 5})
    assert made(toy, tmp_path) != wanted
    assert made(toy, tmp_path, backend=backed(toy, Elsewhere(memory, toy.folder)).backend) == wanted
    net = Checkpoint.open(toy.folder / "net")
    table = Checkpoint.open(toy.folder / "text")["table.weight"]
    row = table.nbytes // table.shape[0]
    assert ("net/model.safetensors", net["shift"].offset, net["shift"].nbytes) in memory.reads
    assert ("text/model.safetensors", table.offset + 7 * row, row) in memory.reads
    assert {name for name, _, _ in memory.reads} == {"net/model.safetensors", "text/model.safetensors"}


def test_where_no_file_is_left_a_run_is_planned_made_and_verified_all_the_same(toy, tmp_path):
    memory = Memory(toy.folder)
    for path in toy.folder.rglob("*.safetensors"):
        path.unlink()
    own = backed(toy, Elsewhere(memory, toy.folder))
    assert [s["name"] for s in runner.plan(own)["stages"]] == ["text", "net"]
    report = runner.run(own, tmp_path / "out")
    assert (report["read"], report["disk"]["disk_bytes_per_s"]) == ("remote", None)
    assert verify(own)["equal"]


def test_a_file_that_is_another_by_now_ends_the_run_by_its_name(toy, tmp_path, memory):
    toy.during = lambda n: memory.changed.append("its version was 1 and is 2")
    said = "net/model.safetensors changed while it was in use: its version was 1 and is 2"
    with pytest.raises(SegmentLoadError, match=said):
        runner.run(backed(toy, Elsewhere(memory, toy.folder)), tmp_path / "out")


def test_weights_that_a_pipeline_opens_past_the_backend_are_refused(toy, tmp_path, memory):
    toy.folder = Opened(toy.folder)
    with pytest.raises(ConfigError, match=r"pipeline 'toy' opens the weights of stage 'text' .* by itself"):
        runner.run(backed(toy, Elsewhere(memory, toy.folder.path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Opened:
    """A folder whose checkpoints are opened before the engine sees them."""

    def __init__(self, path):
        self.path = path

    def __truediv__(self, name):
        return Checkpoint.open(self.path / name)


def test_what_a_pipeline_opens_by_the_run_comes_through_the_backend(toy, tmp_path, memory, monkeypatch):
    declare = ToyPipeline.declare

    def through_the_run(self, session, run):
        toy.folder = Through(run, toy.folder)
        declare(self, session, run)

    monkeypatch.setattr(ToyPipeline, "declare", through_the_run)
    runner.run(backed(toy, Elsewhere(memory, toy.folder)), tmp_path / "out")
    assert memory.reads


class Through(Opened):
    def __init__(self, run, path):
        self.run, self.path = run, path

    def __truediv__(self, name):
        return self.run.checkpoint(self.path / name)


class Counted:
    """Supplies the pipeline's own networks with a store of its own round the files."""

    def __init__(self):
        self.loads = []

    def network(self, stage, network, run):
        return network._replace(around=lambda files: Store(files, self.loads, stage))

    def identity(self):
        return "counted 1"

    def close(self):
        self.loads.append(("closed", ""))


class Store:
    def __init__(self, files, loads, stage):
        self.files, self.loads, self.stage = files, loads, stage

    def begin(self, load):
        self.loads.append((self.stage, load.segment.name))
        return Whole(lambda: self.files.begin(load).finish(lambda: None))

    def close(self):
        pass


def test_a_backend_gives_any_stage_a_store_and_the_same_bits(toy, tmp_path):
    backend = Counted()
    assert made(toy, tmp_path, backend=backed(toy, backend).backend) == made(toy, tmp_path)
    assert {stage for stage, _ in backend.loads[:-1]} == {"text", "net"}
    assert backend.loads[-1] == ("closed", "")


def test_a_run_is_not_resumed_with_what_computes_otherwise(toy, tmp_path):
    def stopped(n):
        raise KeyboardInterrupt

    toy.during, backend = stopped, Counted()
    with pytest.raises(KeyboardInterrupt):
        runner.run(backed(toy, backend), tmp_path / "out")
    backend.identity = lambda: "counted 2"
    with pytest.raises(ConfigError, match="backend"):
        runner.run(backed(toy, backend), tmp_path / "out", resume=True)


class Nothing:
    def network(self, stage, network, run):
        return None


@pytest.mark.parametrize("what", ["run", "plan"])
def test_a_stage_that_a_backend_has_no_segments_for_is_refused_by_name(toy, tmp_path, what):
    own = backed(toy, Nothing())
    with pytest.raises(
        ConfigError, match="backend: mine: has no segments for stage 'text' of pipeline 'toy'"
    ):
        runner.plan(own) if what == "plan" else runner.run(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Fails(Nothing):
    def __init__(self, **answers):
        self.answers = answers

    def network(self, stage, network, run):
        return self.answer("network", network)

    def checkpoint(self, path):
        return self.answer("checkpoint", Checkpoint.open(path))

    def identity(self):
        return self.answer("identity", "")

    def answer(self, method, usual):
        answer = self.answers.get(method, usual)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("method", ["network", "checkpoint", "identity"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [(7, "returned 7, expected"), (OSError("gone"), "OSError: gone")],
    ids=["wrong", "raises"],
)
def test_a_backend_that_fails_is_blamed_by_plugin_and_method(toy, tmp_path, method, answer, said):
    with pytest.raises(PluginError, match=rf"plugin 'builtin', backend 'mine', {method}\(\): {said}"):
        runner.run(backed(toy, Fails(**{method: answer})), tmp_path / "out")


def test_what_is_no_backend_is_refused_when_it_is_built(toy, tmp_path):
    with pytest.raises(
        PluginError, match=r"build\(\) of backend 'mine': returned .*, expected an object with"
    ):
        runner.run(backed(toy, object()), tmp_path / "out")
