"""What a power cut at any moment would leave of a folder: what was synced, and nothing else.

A file is on the disk as it was when it was last synced, a name once its folder was synced with it.
"""

import os
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

_heard = []


def _hear(event, args):
    if event == "os.rename":
        for disk in _heard:
            disk.renamed(args[0], args[1])


sys.addaudithook(_hear)


class Disk:
    """What is on the disk of all below `root`; `early` lists what was renamed before it was there."""

    def __init__(self, root):
        self.root, self.early, self.renames = Path(root), [], []
        self._files, self._names = {}, {}

    def synced(self, descriptor):
        """Note that a file or folder has been brought to the disk."""
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(descriptor)}
        else:
            self._files[found.st_ino] = (found.st_size, found.st_mtime_ns)

    def renamed(self, source, target):
        """Hear of a rename that is about to be made."""
        source, target = Path(os.fsdecode(source)), Path(os.fsdecode(target))
        if target.is_relative_to(self.root):
            self.renames.append(target.relative_to(self.root).as_posix())
            self.early += [f"{path} before {target.name}" for path in self._missing(source)]

    def lost(self):
        """Return what below the root a power cut now would take, or leave in another form."""
        return sorted(path.relative_to(self.root).as_posix() for path in self._missing(self.root))

    def _missing(self, at):
        if not at.is_dir():
            found = at.stat()
            return [] if self._files.get(found.st_ino) == (found.st_size, found.st_mtime_ns) else [at]
        names = self._names.get(at.stat().st_ino, {})
        missing = []
        for path in at.iterdir():
            missing += [path] if names.get(path.name) != path.lstat().st_ino else self._missing(path)
        return missing


@contextmanager
def recorded(root, monkeypatch):
    """Yield the disk below a folder as the calls of the block leave it."""
    disk, fsync = Disk(root), os.fsync

    def watched(descriptor):
        fsync(descriptor)
        disk.synced(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        _heard.append(disk)
        try:
            yield disk
        finally:
            _heard.remove(disk)
