"""Weights that lie on no disk: a source over bytes in memory, and a backend that opens them."""

from __future__ import annotations

from pathlib import Path

from blockstream.checkpoint import Checkpoint, header_from
from blockstream.errors import CheckpointError


class Memory:
    """The bytes of the files of a folder, read by name. A `blockstream.checkpoint.Source`."""

    def __init__(self, folder: Path) -> None:
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
        self.reads: list[tuple[str, int, int]] = []
        self.changed: list[str] = []

    def read(self, file, offset, into):
        data = self.files[str(file.path)][offset : offset + len(into)]
        if len(data) < len(into):
            raise CheckpointError(f"{file.path}: ends early")
        self.reads.append((str(file.path), offset, len(into)))
        into[:] = data

    def changes(self, file):
        return self.changed


class Elsewhere:
    """Opens in memory what a config names by a path under `root`. A `blockstream.plugins.Backend`."""

    def __init__(self, memory: Memory, root: Path) -> None:
        self.memory, self.root = memory, root

    def checkpoint(self, path):
        name = path.relative_to(self.root) / "model.safetensors"
        header = header_from(self.memory, name, len(self.memory.files[str(name)]))
        return Checkpoint(path, "safetensors", header.entries)
