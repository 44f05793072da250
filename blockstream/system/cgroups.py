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
        places = [m for m in seen if _shows(m, version, controller)]
        # A bind mount of a foreign group says nothing of this process, unless it is all there is: a
        # container that knows its group by the host's path sees the group at the mount point.
        for mount in [m for m in places if _inside(m, path) is not None] or places:
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


def _inside(mount: Mount, path: str) -> PurePosixPath | None:
    """Return where below its mount point a mount shows the group at `path`, None if it does not."""
    group = PurePosixPath(path)
    if not group.is_relative_to(mount.root):
        return None
    inside = group.relative_to(mount.root)
    return None if ".." in inside.parts else inside


def _walk(mount: Mount, version: int, path: str, root: Path) -> Iterator[Group]:
    """Yield the group at `path` and its ancestors as far as the mount shows them."""
    top, below = root / mount.point.lstrip("/"), _inside(mount, path) or PurePosixPath()
    for inner in (below, *below.parents):
        yield Group(version, str(PurePosixPath(mount.root) / inner), top / inner, inner == below)
