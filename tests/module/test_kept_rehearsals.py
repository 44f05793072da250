"""What a forward shows is kept by all that it depends on, and by nothing else."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from blockstream.module import kept_rehearsals, rehearsal
from blockstream.module.faking import Call
from blockstream.module.fingerprint import fingerprint
from blockstream.module.rehearsal import rehearse

SCALE = 2


@pytest.fixture(autouse=True)
def nothing_held():
    """Begin without what earlier tests left in the process."""
    kept_rehearsals.forget()


def helper(x):
    return x * SCALE


class Net(nn.Module):
    heads = 2

    def __init__(self, act=torch.relu, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.act, self.repeats = act, 1

    def forward(self, x, y=None):
        for block in self.blocks:
            x = self.act(block(x)) if y is None else block(x) + y
        return helper(x)


def empty(module, name, dtype):
    return nn.Parameter(torch.empty_like(module.get_parameter(name), dtype=dtype))


def of(module, *args, dtype=None, **kwargs):
    found = fingerprint(
        module, Call(args or (torch.ones(1, 8),), kwargs), dtype and (lambda name: empty(module, name, dtype))
    )
    return found and found.digest


def renamed(net):
    net.other = nn.Identity()


def tied(net):
    net.blocks[1].weight = net.blocks[0].weight


def closing(n):
    return lambda x: x + n


@pytest.mark.parametrize(
    "change",
    [
        lambda net, patch: setattr(net, "repeats", 2),
        lambda net, patch: setattr(net, "act", torch.tanh),
        lambda net, patch: setattr(net, "act", closing(2)),
        lambda net, patch: setattr(net, "training", not net.training),
        lambda net, patch: renamed(net),
        lambda net, patch: tied(net),
        lambda net, patch: net.blocks[0].bfloat16(),
        lambda net, patch: patch.setattr(Net, "heads", 4),
        lambda net, patch: patch.setattr(Net, "forward", lambda self, x: self.blocks[0](x)),
        lambda net, patch: patch.setattr(f"{__name__}.SCALE", 3),
        lambda net, patch: patch.setattr(f"{__name__}.helper", lambda x: x),
        lambda net, patch: patch.setattr(torch.backends.mkldnn, "enabled", False),
    ],
    ids=[
        "attribute",
        "function",
        "closure",
        "training",
        "child",
        "tied",
        "dtype",
        "class",
        "forward",
        "constant",
        "helper",
        "switch",
    ],
)
def test_whatever_a_forward_depends_on_is_in_it(change, monkeypatch):
    net = Net(closing(1))
    before = of(net)
    assert of(Net(closing(1))) == before
    change(net, monkeypatch)
    assert of(net) not in (None, before)


def test_the_call_counts_by_shapes_dtypes_and_what_is_shared():
    net, x, y = Net(), torch.ones(1, 8), torch.ones(1, 8)
    calls = [
        of(net, x),
        of(net, torch.ones(2, 8)),
        of(net, x.bfloat16()),
        of(net, x, y=y),
        of(net, x, y=x.view(1, 8)),
        of(net, x, dtype=torch.bfloat16),
    ]
    assert len(set(calls)) == len(calls)
    assert of(net, torch.zeros(1, 8)) == calls[0]
    assert of(net, torch.ones(8, 2).T) != of(net, torch.ones(2, 8))


def test_what_cannot_be_told_has_none():
    net = Net()
    net.generator = torch.Generator()
    assert of(net) is None
    ran = []
    net.generator, net.act = torch.nn.Identity(), lambda x: ran.append(x) or x
    assert of(net) is not None
    net.seen = (n for n in range(3))
    assert of(net) is None


def test_a_forward_is_rehearsed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path))
    net, x = Net(), torch.ones(1, 8)
    first = rehearse(net, x)
    monkeypatch.setattr(rehearsal, "faked", None)
    assert rehearse(Net(), x) == first
    kept_rehearsals.forget()
    assert rehearse(Net(), x) == first, "kept in the cache folder"
    assert rehearse(Net(), torch.ones(2, 8)) is None, "another shape is another forward"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 1}', b"[1]", b'{"schema": 9, "path": ""}'])
def test_a_damaged_file_is_done_without(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path))
    first = rehearse(Net(), torch.ones(1, 8))
    (file,) = (tmp_path / "rehearsals").iterdir()
    file.write_bytes(damage)
    kept_rehearsals.forget()
    assert rehearse(Net(), torch.ones(1, 8)) == first


def test_only_so_many_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_rehearsals, "MOST_FILES", 3)
    monkeypatch.setattr(kept_rehearsals, "MOST_HELD", 2)
    for n in range(1, 6):
        rehearse(Net(), torch.ones(n, 8))
    assert len(list((tmp_path / "rehearsals").iterdir())) == 3
    assert kept_rehearsals.held() == 2


def test_another_process_finds_it_until_the_source_changes(tmp_path):
    package = tmp_path / "nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rest.py").write_text("def act(x):\n    return x\n")
    (package / "net.py").write_text(
        "from torch import nn\nfrom .rest import act\n\nclass Net(nn.Module):\n"
        "    def forward(self, x):\n        return act(x)\n"
    )
    script = (
        "import torch\nfrom nets.net import Net\nfrom blockstream.module.fingerprint import fingerprint\n"
        "from blockstream.module.faking import Call\n"
        "found = fingerprint(Net(), Call((torch.ones(2),)))\nprint(found.digest, found.lasting)\n"
    )

    def said():
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout.split()

    first = said()
    assert first == said() and first[1] == "True"
    (package / "rest.py").write_text("def act(x):\n    return x + 1\n\n# longer\n")
    assert said()[0] != first[0]
