"""The same bits as from the disk, whatever the server does; what cannot be had is an error by name."""

import json
import shutil

import pytest
import torch
from blockstream_http_range import Options
from blockstream_http_range.reading import HttpRange
from safetensors.torch import save_file
from server import serving
from torch import nn

import blockstream
from blockstream.errors import BlockstreamError, CheckpointError, ConfigError
from blockstream.plugins import Plugins


class Net(nn.Module):
    """Four blocks, a stored buffer, and a table of 5 MB that is read by rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20_000, 64)
        self.register_buffer("shift", torch.zeros(64))
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, ids):
        x = self.table(ids) + self.shift
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.fixture(name="server", scope="module")
def _server():
    with serving() as server:
        yield server


@pytest.fixture(name="folder")
def _folder(server, tmp_path):
    """A folder of weights that the server has, and nobody else: one file, another as two shards."""
    random = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=random) for k, v in Net().state_dict().items()}
    names = list(state)
    index = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(state, tmp_path / "one" / "model.safetensors")
    for shard in set(index.values()):
        save_file({n: state[n] for n in names if index[n] == shard}, tmp_path / "two" / shard)
    text = json.dumps({"weight_map": index})
    (tmp_path / "two" / "model.safetensors.index.json").write_text(text)
    server.files = {f"/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*.*")}
    server.faults, server.asked = [], []
    server.digests, server.weak, server.ranges = True, False, True
    return tmp_path


@pytest.fixture(name="backend")
def _backend(server, folder):
    made = HttpRange(Options(url=server.url, root=folder, retries=2, backoff_s=0))
    yield made
    made.close()


IDS = torch.tensor([[7, 19_999, 3, 7]])


def streamed(checkpoint):
    """Return what two passes through the net give, with a third of its blocks in memory."""
    with blockstream.open(arena="48KiB") as session, torch.inference_mode():
        net = session.stage("net", Net, checkpoint, passes=2)
        return torch.stack([net(IDS), net(IDS)])


def test_blockstream_finds_the_plugin_by_its_name():
    plugins = Plugins()
    plugins.load("http-range")
    options = plugins.offers("backend", "http-range")["http-range"].options
    assert options(url="http://host/", root="x").retries == 4


@pytest.mark.parametrize("form", ["one", "two"])
def test_a_network_has_the_same_bits_from_the_server_as_from_the_disk(folder, server, backend, form):
    wanted = streamed(folder / form)
    shutil.rmtree(folder / form)
    assert torch.equal(streamed(backend.checkpoint(folder / form)), wanted)
    asked = sum(
        int(b) - int(a) + 1 for a, b in (r.removeprefix("bytes=").split("-") for _, r in server.asked)
    )
    whole = sum(len(data) for path, data in server.files.items() if path.startswith(f"/{form}/"))
    assert asked < whole / 10, "of the table rows alone are fetched"


@pytest.mark.parametrize(
    "faults",
    [[503], [500, 429], ["half"], ["other bytes"], ["other range"], ["half", "other bytes"]],
    ids=str,
)
def test_what_a_second_request_mends_changes_no_bit(folder, server, backend, faults):
    checkpoint = backend.checkpoint(folder / "one")
    wanted = streamed(folder / "one")
    server.faults = list(faults)
    assert torch.equal(streamed(checkpoint), wanted)
    assert not server.faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (503, "the server answers 503 Service Unavailable, 3 times"),
        ("half", "3 times"),
        ("other bytes", "sent bytes that are not those of its Content-Digest, 3 times"),
        ("other range", "the server sent the range 'bytes 1-.*' where 'bytes 0-"),
    ],
)
def test_what_no_request_mends_is_an_error_that_names_the_file(folder, server, backend, fault, said):
    server.faults = [fault] * 3
    with pytest.raises(CheckpointError, match=rf"^{server.url}one/model.safetensors: .*{said}"):
        backend.checkpoint(folder / "one")


def test_a_file_that_is_another_by_now_ends_the_pass_by_its_name(folder, server, backend):
    checkpoint = backend.checkpoint(folder / "one")
    server.files["/one/model.safetensors"] = server.files["/one/model.safetensors"][:-1] + b"x"
    with pytest.raises(BlockstreamError, match=r"one/model.safetensors: has changed since it was opened"):
        streamed(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weak": True}, "no strong ETag"),
        ({"ranges": False}, "sends no ranges"),
        ({"files": {}}, "has none of model.safetensors.index.json, model.safetensors"),
    ],
    ids=str,
)
def test_a_server_that_cannot_be_relied_on_is_refused(folder, server, backend, change, said):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(CheckpointError, match=said):
        backend.checkpoint(folder / "one")


def test_digests_can_be_required(folder, server):
    strict = HttpRange(Options(url=server.url, root=folder, digests="required"))
    assert strict.checkpoint(folder / "one")
    server.digests = False
    with pytest.raises(CheckpointError, match="sends no Content-Digest"):
        strict.checkpoint(folder / "one")
    strict.close()


def test_a_server_that_is_not_there_is_named(folder):
    gone = HttpRange(Options(url="http://127.0.0.1:9/", root=folder, retries=1, backoff_s=0))
    with pytest.raises(CheckpointError, match=r"^http://127.0.0.1:9/one/\S+: .*, 2 times"):
        gone.checkpoint(folder / "one")
    gone.close()


def test_an_index_may_only_name_what_lies_beside_it(folder, server, backend):
    server.files["/two/model.safetensors.index.json"] = (
        b'{"weight_map": {"shift": "../one/model.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="shards lie beside their index"):
        backend.checkpoint(folder / "two")


def test_a_path_outside_root_is_refused(folder, backend):
    with pytest.raises(ConfigError, match="is not below root"):
        backend.checkpoint(folder.parent / "other")
