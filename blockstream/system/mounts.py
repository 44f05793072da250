"""What is mounted where: `/proc/self/mountinfo` as values.

Both questions the package asks of it start here: where the control groups are, and what kind of
file system holds a checkpoint. Systems without the file have no mounts as far as this is concerned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

#: The machine's own tree. Tests pass a folder that holds a made-up /proc and /sys instead.
ROOT = Path("/")

_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "glusterfs", "gpfs", "lustre", "nfs"}
_NETWORK |= {"nfs4", "orangefs", "smb3", "smbfs", "sshfs", "virtiofs"}
_OVERLAY = {"aufs", "fuse-overlayfs", "overlay", "overlayfs", "unionfs"}
_MEMORY = {"ramfs", "tmpfs"}

Kind = Literal["local", "network", "overlay", "memory", "unknown"]


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: the part `root` of a file system `fstype`, seen at `point`.

    `source` is the device or share, `options` the options of the file system itself, which for
    version 1 control groups name the controllers.
    """

    root: str
    point: str
    fstype: str
    source: str
    options: frozenset[str]


def mounts(root: Path = ROOT) -> tuple[Mount, ...]:
    """Return the mounts this process sees, in the order they were made."""
    found = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        # proc(5): id parent major:minor root point options [tag[:value] ...] - type source options
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if separator and len(before) >= 6 and len(after) >= 3:
            found.append(
                Mount(
                    root=_unescape(before[3]),
                    point=_unescape(before[4]),
                    fstype=_unescape(after[0]),
                    source=_unescape(after[1]),
                    options=frozenset(after[2].split(",")),
                )
            )
    return tuple(found)


def mount_of(path: Path, root: Path = ROOT) -> Mount | None:
    """Return the mount that holds `path` (absolute, links resolved), None when it is not known.

    The deepest mount point wins, and among equal ones the last, which hides those before it.
    """
    best: Mount | None = None
    for mount in mounts(root):
        inside = PurePosixPath(path).is_relative_to(mount.point)
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What holds a path: its type, its device or share, and what kind of thing that is."""

    fstype: str
    source: str
    point: str
    kind: Kind


def file_system(path: Path | str, root: Path = ROOT) -> FileSystem:
    """Return what holds `path`, from the mount table; kind "unknown" where there is none."""
    mount = mount_of(Path(path).resolve(), root)
    if mount is None:
        return FileSystem("unknown", "", "", "unknown")
    name = mount.fstype.removeprefix("fuse.")
    kind: Kind = "local"
    if name in _NETWORK or (mount.fstype.startswith("fuse") and ":" in mount.source):
        kind = "network"
    elif name in _OVERLAY:
        kind = "overlay"
    elif name in _MEMORY:
        kind = "memory"
    return FileSystem(mount.fstype, mount.source, mount.point, kind)


def read_text(path: Path) -> str:
    """Return the text of a small kernel file, "" where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(field: str) -> str:
    """Return a mountinfo field with its octal escapes (space, tab, newline, backslash) undone."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)
