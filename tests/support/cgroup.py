"""Run commands in a control group of their own, under a limit the kernel enforces.

    with limited(memory_nbytes=64 << 20) as group:
        done = group.run([sys.executable, "-c", "..."])

Works with version 1 and version 2, where this process may make groups; `why_not()` says why it may
not. Limits hold for the commands, never for the calling process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockstream.system.cgroups import Group, groups

#: Moves itself into each group whose cgroup.procs is named before "--", then becomes the command.
_LAUNCH = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'


@dataclass
class Limited:
    """A group that has been made: `folders` maps a controller to the group's folder."""

    version: int
    folders: dict[str, Path]
    _children: list[subprocess.Popen[Any]] = field(default_factory=list)

    def popen(self, command: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a command in the group; one that still runs at the end is killed."""
        procs = [str(f / "cgroup.procs") for f in dict.fromkeys(self.folders.values())]
        child = subprocess.Popen(["/bin/sh", "-c", _LAUNCH, "sh", *procs, "--", *command], **kwargs)
        self._children.append(child)
        return child

    def run(self, command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the group and return what it wrote; -9 is the kernel's kill."""
        child = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = child.communicate(timeout=timeout)
        return subprocess.CompletedProcess(list(command), child.returncode, out, err)

    def set_memory(self, nbytes: int) -> None:
        """Move the limit while commands run; raises OSError when less cannot be reached."""
        _set_memory(self.version, self.folders["memory"], nbytes)

    @property
    def usage_nbytes(self) -> int:
        """Return what is charged to the group now, page cache included."""
        file = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int((self.folders["memory"] / file).read_text())

    @property
    def peak_nbytes(self) -> int:
        """Return the most that was charged to the group, page cache included."""
        file = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.folders["memory"] / file).read_text())

    def close(self) -> None:
        """Kill what still runs in the group and remove it."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        for folder in dict.fromkeys(self.folders.values()):
            _remove(folder)


@contextlib.contextmanager
def limited(memory_nbytes: int | None = None, cpus: float | None = None) -> Iterator[Limited]:
    """Make a group with a limit on memory (no swap) or processor time, and remove it at the end.

    Raises PermissionError with a reason where that is not possible.
    """
    wanted = [c for c, limit in (("memory", memory_nbytes), ("cpu", cpus)) if limit is not None]
    name, folders, version = f"blockstream-test-{uuid.uuid4().hex[:8]}", {}, 1
    with contextlib.ExitStack() as undo:
        for controller in wanted:
            parent = _parent(controller)
            version = parent.version
            folder = parent.folder / name
            if not folder.exists():
                folder.mkdir()
                undo.callback(folder.rmdir)
            folders[controller] = folder
        if memory_nbytes is not None:
            _set_memory(version, folders["memory"], memory_nbytes)
        if cpus is not None:
            _set_cpus(version, folders["cpu"], cpus)
        if version == 2 and len(set(folders.values())) > 1:
            raise PermissionError(f"{wanted} are handed on by different control groups: {folders}")
        group = Limited(version, folders)
        undo.pop_all()
    try:
        yield group
    finally:
        group.close()


def _remove(folder: Path) -> None:
    """Kill what the group's commands left running, and remove the group once they are gone."""
    until, pause = time.monotonic() + 10, threading.Event()
    while True:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
        pause.wait(0.01)


def why_not(*controllers: str) -> str | None:
    """Return why no group with these controllers can be made, None when one can."""
    try:
        for controller in controllers:
            _parent(controller)
    except PermissionError as error:
        return str(error)
    return None


def _parent(controller: str) -> Group:
    """Return the group to make a group in: one that hands the controller on, and may be written to.

    In version 2 a group with processes hands nothing on, so it is an ancestor: the new group stands
    beside this process's own and under the same limits from above.
    """
    marks = {"memory": ("memory.limit_in_bytes", "memory"), "cpu": ("cpu.cfs_quota_us", "cpu")}
    file, name = marks[controller]
    for group in groups(controller):
        handed_on = group.folder / "cgroup.subtree_control"
        if group.version == 1:
            usable = (group.folder / file).exists()
        else:
            usable = handed_on.exists() and name in handed_on.read_text().split()
        if usable and os.access(group.folder, os.W_OK) and os.access(group.folder / "cgroup.procs", os.W_OK):
            return group
    raise PermissionError(f"no control group here hands on the {controller} controller to groups of ours")


def _set_memory(version: int, folder: Path, nbytes: int) -> None:
    if version == 2:
        (folder / "memory.max").write_text(str(nbytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        return
    # Memory and swap together may never be limited below memory alone: the order depends.
    files = [folder / "memory.limit_in_bytes", folder / "memory.memsw.limit_in_bytes"]
    if nbytes > int(files[0].read_text()):
        files.reverse()
    for file in files:
        if file.exists():
            file.write_text(str(nbytes))


def _set_cpus(version: int, folder: Path, cpus: float) -> None:
    if version == 2:
        (folder / "cpu.max").write_text(f"{round(cpus * 100_000)} 100000")
        return
    (folder / "cpu.cfs_period_us").write_text("100000")
    (folder / "cpu.cfs_quota_us").write_text(str(round(cpus * 100_000)))
