"""The control groups this process is in, version 1, version 2 and both at once.

`/proc/self/cgroup` gives the group's path and `/proc/self/mountinfo` where its hierarchy is seen;
a limit of any ancestor binds as well as the group's own. Paths in both files are relative to the
control group namespace, and a container often sees no more of a hierarchy than its own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .mounts import ROOT, Mount, mounts, read_text

#: Version 1 says "no limit" with the largest multiple of the page size that fits 63 bits.
UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Group:
    """One control group as a folder of files; `name` is its path as its hierarchy calls it.

    `own` marks the group the process is in, as far as it is visible; the others are its ancestors.
    """

    version: int
    name: str
    folder: Path
    own: bool

    def number(self, file: str) -> int | None:
        """Return the number in `file`, None where there is none: missing, "max", -1, no limit."""
        text = read_text(self.folder / file).strip()
        if not text.isdigit() or int(text) >= UNLIMITED:
            return None
        return int(text)

    def stat(self, file: str) -> dict[str, int]:
        """Return the `key number` lines of `file`."""
        lines = (line.split() for line in read_text(self.folder / file).splitlines())
        return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def groups(controller: str, root: Path = ROOT) -> tuple[Group, ...]:
    """Return the groups that bind this process for `controller`: each its own, then its ancestors.

    Both versions are listed where both are mounted. A hierarchy that does not have the controller
    has none of its files, so it says nothing.
    """
    seen = mounts(root)
    found: dict[Path, Group] = {}
    for version, path in _memberships(controller, root):
        for mount in seen:
            if _shows(mount, version, controller):
                for group in _walk(mount, version, path, root):
                    found.setdefault(group.folder, group)
    return tuple(found.values())


def _memberships(controller: str, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (version, path) of the groups `/proc/self/cgroup` names for the controller."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _shows(mount: Mount, version: int, controller: str) -> bool:
    if version == 2:
        return mount.fstype == "cgroup2"
    return mount.fstype == "cgroup" and controller in mount.options


def _walk(mount: Mount, version: int, path: str, root: Path) -> Iterator[Group]:
    """Yield the group at `path` and its ancestors as far as the mount shows them.

    A group the mount does not show (a container that sees the host's path, a process outside its
    namespace's root) is taken to be below the mount point, whose own limits bind it still.
    """
    top = root / mount.point.lstrip("/")
    group, shown = PurePosixPath(path), PurePosixPath(mount.root)
    below = PurePosixPath()
    if group.is_relative_to(shown) and ".." not in group.parts:
        inner = group.relative_to(shown)
        if (top / inner).is_dir():
            below = inner
    for inner in (below, *below.parents):
        yield Group(version, str(shown / inner), top / inner, inner == below)
