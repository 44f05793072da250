"""Some stages' segments come from stores of their own."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.engine.store import StagesStore
from blockstream.errors import ModelError, SegmentLoadError
from blockstream.plan.segments import Extent
from tests.support.fakes import FakeStore, a_load


class Closing(FakeStore):
    def __init__(self, closed, name, fails=False):
        super().__init__()
        self.closed, self.name, self.fails = closed, name, fails

    def close(self):
        self.closed.append(self.name)
        if self.fails:
            raise OSError("close")


def test_a_stages_own_store_loads_its_segments_and_the_files_all_others():
    closed = []
    files, own = Closing(closed, "files"), Closing(closed, "own")
    store = StagesStore(files, {"b": lambda inner: own})
    for stage in ("a", "b"):
        store.begin(a_load(stage, f"{stage}.0", Extent(0, 4096))).finish(lambda: None).release()
    assert (files.loads, own.loads) == (["a.0"], ["b.0"])
    store.close()
    assert closed == ["own", "files"]


def test_every_store_is_closed_though_one_fails():
    closed = []
    files, own = Closing(closed, "files"), Closing(closed, "own", fails=True)
    with pytest.raises(OSError, match="close"):
        StagesStore(files, {"b": lambda inner: own}).close()
    assert closed == ["own", "files"]


class Twice:
    """Loads as the files do, and counts; refuses what it is told to."""

    def __init__(self, files, refused=""):
        self.files, self.refused, self.loads = files, refused, []

    def begin(self, load):
        segment = load.segment.name
        if segment == self.refused:
            raise SegmentLoadError(f"{load.stage}: segment {segment!r}: not today")
        self.loads.append(segment)
        return self.files.begin(load)

    def close(self):
        pass


@pytest.fixture(name="model")
def _model(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).requires_grad_(False)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    return module, tmp_path / "model.safetensors"


def test_a_session_loads_a_stage_through_the_store_made_around_its_files(model):
    module, path = model
    x, made = torch.ones(2, 64), []
    wanted = module(x)
    with blockstream.open(arena="64KiB") as session:
        streamed = session.stage(
            "s", module, path, passes=2, around=lambda files: made.append(Twice(files)) or made[0]
        )
        for _ in range(2):
            assert torch.equal(streamed(x), wanted)
    assert made[0].loads[:3] == ["0", "1", "2"]


def test_what_a_stages_own_store_raises_reaches_the_forward(model):
    module, path = model
    with blockstream.open(arena="64KiB") as session:
        streamed = session.stage("s", module, path, around=lambda files: Twice(files, refused="1"))
        with pytest.raises(SegmentLoadError, match="segment '1': not today"):
            streamed(torch.ones(2, 64))


def test_verification_does_not_hold_resident_what_another_store_loads(model):
    from blockstream.verify.sessions import ResidentSession

    module, path = model
    options = {"segments": {}, "streamed": frozenset(), "seen": lambda *args: None, "arena": None}
    with ResidentSession(**options) as session, pytest.raises(ModelError, match="store of its own"):
        session.stage("s", module, path, around=lambda files: files)


def test_a_checkpoint_of_entries_alone_streams_and_is_held_resident(model, tmp_path):
    """Files of no known form: what lies where is said by who made the entries."""
    from blockstream.checkpoint import Checkpoint, FileStamp, TensorEntry
    from blockstream.module.prepared import Prepared
    from blockstream.verify.reference import Reference

    module, _ = model
    path, entries = tmp_path / "weights.raw", {}
    with path.open("wb") as stream:
        for name, value in module.state_dict().items():
            entries[name] = (stream.seek(-(-stream.tell() // 64) * 64), value)
            stream.write(value.numpy().tobytes())
    with path.open("rb") as stream:
        stamp = FileStamp.take(stream, path, 0, 64)
    checkpoint = Checkpoint(
        tmp_path,
        "raw",
        {
            name: TensorEntry(name, "F32", tuple(value.shape), stamp, offset, value.nbytes)
            for name, (offset, value) in entries.items()
        },
    )
    x, wanted = torch.ones(2, 64), module(torch.ones(2, 64))
    with blockstream.open(arena="64KiB") as session:
        assert torch.equal(session.stage("s", module, checkpoint)(x), wanted)
    reference = Reference(Prepared("s", module, checkpoint, None))
    assert all(torch.equal(reference.parameter(name), value) for name, (_, value) in entries.items())
    reference.close()
