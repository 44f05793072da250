"""How much memory and how many processors this process may still take, and who says so.

The machine's free memory is one limit among several: a control group, any of its ancestors and the
process's own resource limits may leave less. The least counts, and names where it came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path

import psutil

from .cgroups import UNLIMITED, Group, groups
from .mounts import ROOT, read_text

#: The source of the machine's own limit.
AVAILABLE = "available memory"


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit on memory and what it leaves.

    `used_nbytes` leaves out the page cache the kernel drops before it refuses anything
    (`reclaimable_nbytes`). A `soft` limit slows a process down above it, and kills none.
    """

    source: str
    limit_nbytes: int
    used_nbytes: int
    reclaimable_nbytes: int = 0
    soft: bool = False

    @property
    def free_nbytes(self) -> int:
        """Return what is left under the limit, never below 0."""
        return max(0, self.limit_nbytes - self.used_nbytes)


@dataclass(frozen=True, slots=True)
class Headroom:
    """The bytes this process may still take without swapping, stalling or being killed.

    `limits` holds all that apply, tightest first; the first one gave `nbytes` and `source`.
    `total_nbytes` is the least of their sizes. `swap_nbytes`, not counted in `nbytes`, is what
    could still be swapped out.
    """

    limits: tuple[Limit, ...]
    swap_nbytes: int = 0
    nbytes: int = field(init=False)
    source: str = field(init=False)
    total_nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.limits, key=lambda limit: limit.free_nbytes))
        object.__setattr__(self, "limits", ordered)
        object.__setattr__(self, "nbytes", ordered[0].free_nbytes)
        object.__setattr__(self, "source", ordered[0].source)
        object.__setattr__(self, "total_nbytes", min(limit.limit_nbytes for limit in ordered))


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """The machine's own memory, in bytes; `available` counts page cache that can be dropped."""

    total: int
    available: int
    swap_free: int = 0

    @classmethod
    def now(cls, swap: bool = True) -> SystemMemory:
        """Return what psutil says now, else the C library; without `swap` that is not asked for."""
        try:
            memory = psutil.virtual_memory()
            return cls(memory.total, memory.available, psutil.swap_memory().free if swap else 0)
        except (OSError, KeyError, ValueError, IndexError, RuntimeError):  # no /proc/meminfo, or an empty one
            page = os.sysconf("SC_PAGE_SIZE")
            return cls(os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page)


def headroom(root: Path = ROOT, system: SystemMemory | None = None) -> Headroom:
    """Return what this process may still take: the least over the machine and every limit on it.

    Counted are available memory, version 1 and 2 control groups with all visible ancestors
    (`memory.max`, `memory.high`, `memory.limit_in_bytes`, memory plus swap), and the process's
    address space and data limits. `root` and `system` replace the machine in tests.
    """
    system = system or SystemMemory.now()
    reader = HeadroomReader(root)
    return replace(reader.read(system), swap_nbytes=_swap_free(reader.groups, system))


class HeadroomReader:
    """Reads the headroom, without swap, again and again: the control groups are looked up once."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self.groups = groups("memory", root)

    def read(self, system: SystemMemory | None = None) -> Headroom:
        """Return what this process may still take now."""
        system = system or SystemMemory.now(swap=False)
        machine = Limit(AVAILABLE, system.total, system.total - system.available)
        limits = [machine, *_process_limits(self._root)]
        for group in self.groups:
            limits += _version_2(group) if group.version == 2 else _version_1(group)
        return Headroom(tuple(limits))


def page_cache_nbytes(root: Path = ROOT) -> int | None:
    """Return the page cache charged to this process's control group, None where none is charged."""
    for group in groups("memory", root):
        stat = group.stat("memory.stat")
        cache = stat.get("file") if group.version == 2 else stat.get("total_cache")
        if cache is not None:
            return cache - stat.get("shmem" if group.version == 2 else "total_shmem", 0)
    return None


def _version_2(group: Group) -> Iterator[Limit]:
    usage = group.number("memory.current")
    if usage is None:
        return
    stat = group.stat("memory.stat")
    droppable = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    for file, soft in (("memory.max", False), ("memory.high", True)):
        if (limit := group.number(file)) is not None:
            source = f"cgroup v2 {file} of {group.name}"
            yield Limit(source, limit, max(0, usage - droppable), droppable, soft)


def _version_1(group: Group) -> Iterator[Limit]:
    # An ancestor without use_hierarchy does not count its children; newer kernels have only 1.
    if not group.own and group.number("memory.use_hierarchy") == 0:
        return
    stat = group.stat("memory.stat")
    droppable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    # The hierarchical limits include ancestors that a container cannot see.
    for prefix, inherited in (
        ("memory.", "hierarchical_memory_limit"),
        ("memory.memsw.", "hierarchical_memsw_limit"),
    ):
        usage = group.number(f"{prefix}usage_in_bytes")
        limits = {
            f"{prefix}limit_in_bytes": group.number(f"{prefix}limit_in_bytes") or UNLIMITED,
            inherited: stat.get(inherited, UNLIMITED),
        }
        file, limit = min(limits.items(), key=lambda item: item[1])
        if usage is not None and limit < UNLIMITED:
            source = f"cgroup v1 {file} of {group.name}"
            yield Limit(source, limit, max(0, usage - droppable), droppable)


def _process_limits(root: Path) -> Iterator[Limit]:
    """Yield RLIMIT_AS and RLIMIT_DATA where they are set."""
    status = _fields(read_text(root / "proc/self/status"))
    for line in read_text(root / "proc/self/limits").splitlines():
        for title, name, used in (
            ("Max address space", "RLIMIT_AS", "VmSize"),
            ("Max data size", "RLIMIT_DATA", "VmData"),
        ):
            value = line.removeprefix(title).split()
            if line.startswith(title) and value and value[0].isdigit():
                yield Limit(name, int(value[0]), status.get(used, 0))


def _fields(status: str) -> dict[str, int]:
    """Return the sizes of a /proc status text in bytes."""
    lines = (line.split() for line in status.splitlines() if line.endswith(" kB"))
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}


def _swap_free(memory: tuple[Group, ...], system: SystemMemory) -> int:
    """Return the swap left to this process: the machine's, or less where a group says so."""
    free = [system.swap_free]
    for group in memory:
        limit, used = group.number("memory.swap.max"), group.number("memory.swap.current")
        if limit is not None and used is not None:
            free.append(max(0, limit - used))
        # Version 1 limits memory and swap together: what that allows beyond memory can be swap.
        both, alone = group.number("memory.memsw.limit_in_bytes"), group.number("memory.limit_in_bytes")
        if both is not None and alone is not None:
            swapped = group.stat("memory.stat").get("total_swap", 0)
            free.append(max(0, both - alone - swapped))
    return min(free)


@dataclass(frozen=True, slots=True)
class CpuCount:
    """The compute threads this process should run, and why.

    `affinity` is the number of processors it may be scheduled on, `quota` the processors' worth of
    time its control groups grant it (None: no limit).
    """

    threads: int
    source: str
    affinity: int
    quota: float | None = None


def cpu_count(root: Path = ROOT, affinity: int | None = None) -> CpuCount:
    """Return the number of compute threads: affinity, or less under a control group's CPU quota.

    A fraction of a processor is left to the loader: 2.5 processors' worth of time is 2 threads,
    never fewer than 1. `root` and `affinity` replace the machine in tests.
    """
    if affinity is None:
        affinity = _affinity()
    quotas = [(q, g) for g in groups("cpu", root) if (q := _quota(g)) is not None]
    if not quotas:
        return CpuCount(affinity, "processors this process may use", affinity)
    quota, group = min(quotas, key=lambda pair: pair[0])
    threads = max(1, floor(quota))
    if threads >= affinity:
        return CpuCount(affinity, "processors this process may use", affinity, quota)
    source = f"cgroup v{group.version} CPU quota {quota:g} of {group.name}"
    return CpuCount(threads, source, affinity, quota)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _quota(group: Group) -> float | None:
    """Return the processors' worth of time the group may use, None without a quota."""
    if group.version == 2:
        quota, period = [*read_text(group.folder / "cpu.max").split(), "", ""][:2]
        if quota.isdigit() and period.isdigit() and int(period):
            return int(quota) / int(period)
        return None
    used, over = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    return used / over if used and over else None
