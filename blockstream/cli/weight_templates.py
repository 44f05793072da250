"""The plugins of `blockstream plugins new` that deal with weights: a backend, a format, a command."""

from __future__ import annotations

from .package_kinds import Kind

BACKEND = Kind(
    summary="A backend that reads weights out of a tar archive, where no folder was unpacked.",
    yaml="backend: {name: $name, archive: weights.tar, root: weights}",
    module='''\
"""$summary"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from blockstream.checkpoint import Checkpoint, header_from
from blockstream.errors import CheckpointError, ConfigError
from blockstream.plugins import Choice, hookimpl


class Options(BaseModel):
    """What a config may set: the archive, and the folder that it stands for."""

    archive: Path
    root: Path

    @field_validator("archive", "root")
    @classmethod
    def _absolute(cls, path: Path, info: ValidationInfo) -> Path:
        return (Path((info.context or {}).get("base") or "") / path).absolute()


class Archive:
    """Opens what a config names below `root` in the archive, and reads all of it from there.

    It is the backend, and the source of the files that it opens: headers, buffers, tables and segments
    come through `read`, from several threads at once.
    """

    def __init__(self, options: Options) -> None:
        self.path, self.root = options.archive, options.root
        try:
            with tarfile.open(self.path, "r:") as tar:  # as it is: a compressed one cannot be read anywhere
                self.members = {m.name.removeprefix("./"): m for m in tar if m.isfile()}
            self.file = self.path.open("rb", buffering=0)
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"archive {self.path}: {error}; name an uncompressed tar file") from error
        self.opened = self._look()

    def checkpoint(self, path):
        """Return the checkpoint that the archive has for a folder below `root`; headers alone are read."""
        if not path.is_relative_to(self.root):
            raise ConfigError(f"{path} is not below root {self.root}, for which archive {self.path} stands")
        name = (path.relative_to(self.root) / "model.safetensors").as_posix()
        if name not in self.members:
            there = ", ".join(list(self.members)[:4])
            raise CheckpointError(f"archive {self.path}: has no {name}, but {there}")
        header = header_from(self, Path(name), self.members[name].size)
        return Checkpoint(path, "safetensors", header.entries)

    def read(self, file, offset, into):
        """Fill `into` with the file's bytes from `offset`."""
        at, done = self.members[file.path.as_posix()].offset_data + offset, 0
        while done < len(into):
            n = os.preadv(self.file.fileno(), [into[done:]], at + done)
            if not n:
                raise CheckpointError(f"archive {self.path}: ends inside {file.path}; fetch it again")
            done += n

    def changes(self, file):
        """Return in words what is another since the archive was opened: asked with each load."""
        return [] if self._look() == self.opened else [f"the archive {self.path} was written to"]

    def close(self):
        """Close the archive, as a run ends."""
        self.file.close()

    def _look(self):
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns


@hookimpl
def backends():
    """List the backend: a config of any pipeline names it."""
    return [Choice("$name", Archive, Options, "weights out of a tar archive")]
''',
    imports="""\
import tarfile

import pytest
import torch
from $module import Archive, Options
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.errors import CheckpointError, ConfigError, SegmentLoadError
from blockstream.plugins import Plugins""",
    found='assert "archive" in plugins.offers("backend", "$name")["$name"].options.model_fields',
    tests='''
class Net(nn.Module):
    """Blocks, and a buffer that the checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(64))
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        x = x + self.shift
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """A folder of weights and an archive of it; in the folder itself lie other numbers by now."""
    torch.manual_seed(0)
    state = {name: torch.randn(value.shape) for name, value in Net().state_dict().items()}
    (tmp_path / "weights" / "net").mkdir(parents=True)
    save_file(state, tmp_path / "weights" / "net" / "model.safetensors")
    with tarfile.open(tmp_path / "weights.tar", "w") as tar:
        tar.add(tmp_path / "weights", arcname=".")
    return tmp_path / "weights"


@pytest.fixture(name="archive")
def _archive(folder):
    made = Archive(Options(archive=folder.parent / "weights.tar", root=folder))
    yield made
    made.close()


def streamed(checkpoint):
    """Return what two passes give with half of the weights in memory."""
    with blockstream.open(arena="48KiB") as session, torch.inference_mode():
        net = session.stage("net", Net, checkpoint, passes=2)
        return net(net(torch.ones(2, 64)))


def test_the_bits_are_those_of_the_folder_and_nothing_is_read_from_there(folder, archive):
    wanted = streamed(folder / "net")
    (folder / "net" / "model.safetensors").unlink()
    assert torch.equal(streamed(archive.checkpoint(folder / "net")), wanted)


def test_an_archive_that_was_written_to_ends_the_pass_by_its_name(folder, archive):
    checkpoint = archive.checkpoint(folder / "net")
    with archive.path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises((CheckpointError, SegmentLoadError), match="weights.tar was written to"):
        streamed(checkpoint)


def test_what_is_not_in_the_archive_is_named(folder, archive):
    with pytest.raises(CheckpointError, match="has no text/model.safetensors, but net/model.safetensors"):
        archive.checkpoint(folder / "text")
    with pytest.raises(ConfigError, match="is not below root"):
        archive.checkpoint(folder.parent / "others")
    with pytest.raises(ConfigError, match="name an uncompressed tar file"):
        Archive(Options(archive=folder / "gone.tar", root=folder))
''',
)

FORMAT = Kind(
    summary="A format of weights: four bits each, two a byte, with one scale for each group of a row.",
    shell="blockstream plan FOLDER",
    module='''\
"""$summary"""

from __future__ import annotations

from dataclasses import replace

from blockstream.plugins import Coded, Format, hookimpl

#: Weights that share a scale.
GROUP = 32


def find(tensors):
    """Yield each weight of this format: NAME.nibbles, uint8 [rows, columns / 2], beside NAME.scales."""
    for name, entry in tensors.entries.items():
        if not name.endswith(".nibbles") or entry.dtype != "U8":
            continue
        weight = name.removesuffix(".nibbles")
        scales = tensors.entries.get(f"{weight}.scales")
        rows, half = entry.shape
        if scales is not None and scales.shape == (rows, 2 * half // GROUP):
            yield replace(entry, name=weight, shape=(rows, 2 * half), coded=Coded(name, {"scales": scales}))


def widen(stored):
    """Return one weight as numbers, for the one operation that uses it; the low half of a byte is first."""
    import torch  # here, not above: listing plugins must not import it

    rows, columns = stored.shape
    numbers = torch.stack((stored.raw & 15, stored.raw >> 4), -1).view(rows, columns // GROUP, GROUP)
    scales = stored.beside["scales"].view(rows, columns // GROUP, 1)
    return ((numbers.float() - 8) * scales.float()).view(stored.shape).to(stored.dtype)


@hookimpl
def weight_formats():
    """List the format: elements and bytes of a block, what is beside it, how it is found and widened."""
    return [Format("$name", 2, 1, widen, companions=(".scales",), find=find, by_row=True)]
''',
    imports="""\
import pytest
import torch
from $module import GROUP
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.errors import CheckpointError
from blockstream.plugins import Plugins""",
    found='assert "$name" in [row.name for row in plugins.weight_formats()]',
    tests='''
class Net(nn.Module):
    """Four layers of 64 by 64."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def rounded(weight):
    """Return the nibbles and scales of a weight, and what they stand for."""
    groups = weight.view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half()
    numbers = (groups / scales.float()).round().clamp(-8, 7)
    nibbles = (numbers + 8).to(torch.uint8).view(len(weight), -1)
    value = (numbers * scales.float()).view(weight.shape)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales.squeeze(-1), value


@pytest.fixture(name="coded")
def _coded(tmp_path):
    """A file of coded weights, and the net with what they stand for."""
    torch.manual_seed(0)
    net, tensors = Net(), {}
    with torch.no_grad():
        for name, weight in net.named_parameters():
            nibbles, scales, value = rounded(weight)
            tensors |= {f"{name}.nibbles": nibbles, f"{name}.scales": scales}
            weight.copy_(value)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, net


def test_coded_weights_stream_to_the_bits_of_what_they_stand_for(coded):
    folder, net = coded
    x = torch.randn(2, 64)
    with torch.inference_mode(), blockstream.stream(Net, folder, passes=2, arena="48KiB") as streamed:
        for _ in range(2):
            assert torch.equal(streamed(x), net(x))


def test_a_weight_without_its_scales_is_not_taken_for_one(coded):
    folder, net = coded
    alone = {f"{name}.nibbles": rounded(weight)[0] for name, weight in net.named_parameters()}
    save_file(alone, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor for 4 of 4 parameters"):
        with blockstream.stream(Net, folder):
            pass
''',
)

COMMAND = Kind(
    summary="A command that says how many bytes a checkpoint holds in each dtype.",
    shell="blockstream $name FOLDER",
    group="blockstream.commands",
    module='''\
"""$summary"""

from __future__ import annotations

from collections import Counter

from blockstream.checkpoint import Checkpoint


def configure(parser):
    """Add the command's arguments to an argparse parser."""
    parser.description = "$summary"
    parser.add_argument("checkpoint", metavar="FOLDER", help="a folder or file of weights")
    parser.add_argument("--at-least", type=int, default=0, metavar="BYTES", help="leave smaller sums out")


def run(args):
    """Print a line for each dtype, the most bytes first; return the exit code."""
    nbytes = Counter()
    for entry in Checkpoint.open(args.checkpoint).entries.values():
        nbytes[entry.dtype] += entry.nbytes
    for dtype, sum_of in nbytes.most_common():
        if sum_of >= args.at_least:
            print(f"{dtype:<8}{sum_of:>16,}")
    return 0
''',
    imports="""\
import pytest
import torch
from safetensors.torch import save_file

from blockstream.cli.main import main
from blockstream.plugins import entrypoints""",
    found='assert "$name" in [command.name for command in entrypoints.commands()]',
    tests="""
@pytest.fixture(name="folder")
def _folder(tmp_path):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(300, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_each_dtype_is_a_line_the_largest_first(folder, capsys):
    assert main(["$name", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["BF16", "600"], ["F32", "40"]]


def test_small_sums_can_be_left_out(folder, capsys):
    assert main(["$name", str(folder), "--at-least", "100"]) == 0
    assert capsys.readouterr().out.split() == ["BF16", "600"]


def test_a_folder_without_weights_is_an_error_in_one_line(tmp_path, capsys):
    assert main(["$name", str(tmp_path)]) != 0
    assert "holds no safetensors file" in capsys.readouterr().err
""",
)
