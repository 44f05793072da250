"""Headroom and CPU count on made-up machines, and under control groups the kernel enforces."""

from __future__ import annotations

import json
import os
import sys

import pytest

from blockstream.system.limits import Headroom, Limit, SystemMemory, cpu_count, headroom, page_cache_nbytes
from tests.support.cgroup import limited, why_not
from tests.support.machine import V1_CPU, V1_MEMORY, V1_UNLIMITED, V2, V2_UNIFIED, Machine

MIB = 1 << 20
SYSTEM = SystemMemory(total=8000 * MIB, available=6000 * MIB, swap_free=500 * MIB)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def room(machine: Machine) -> Headroom:
    return headroom(machine.root, SYSTEM)


def test_without_groups_the_headroom_is_what_the_machine_has_available(machine):
    got = room(machine)
    assert (got.nbytes, got.source) == (6000 * MIB, "available memory")
    assert (got.total_nbytes, got.swap_nbytes) == (8000 * MIB, 500 * MIB)


def test_a_v2_limit_discounts_the_page_cache_that_can_go(machine):
    machine.process("0::/job", V2.format(root="/"))
    machine.v2("job", 1000 * MIB, 990 * MIB, inactive_file=600 * MIB, active_file=200 * MIB, file=800 * MIB)
    got = room(machine)
    assert got.nbytes == (1000 - (990 - 600 - 200)) * MIB
    assert got.source == "cgroup v2 memory.max of /job"
    assert got.limits[0].reclaimable_nbytes == 800 * MIB
    assert got.total_nbytes == 1000 * MIB


def test_a_v1_limit_discounts_the_page_cache_of_all_groups_below(machine):
    machine.process("4:memory:/job", V1_MEMORY.format(root="/"))
    stat = {"inactive_file": 1 * MIB, "total_inactive_file": 300 * MIB, "total_active_file": 100 * MIB}
    machine.v1("job", 1000 * MIB, 900 * MIB, **stat)
    assert room(machine).nbytes == 500 * MIB
    assert room(machine).source == "cgroup v1 memory.limit_in_bytes of /job"


def test_the_tightest_ancestor_counts_though_the_group_itself_has_more(machine):
    machine.process("0::/a/b/c", V2.format(root="/"))
    machine.v2("a/b/c", 900 * MIB, 100 * MIB)
    machine.v2("a/b", 500 * MIB, 350 * MIB, inactive_file=50 * MIB)
    machine.v2("a", "max", 400 * MIB)
    got = room(machine)
    assert (got.nbytes, got.source) == (200 * MIB, "cgroup v2 memory.max of /a/b")
    assert [limit.source for limit in got.limits] == [
        "cgroup v2 memory.max of /a/b",
        "cgroup v2 memory.max of /a/b/c",
        "available memory",
    ]


def test_v1_ancestors_count_too_unless_they_do_not_count_their_children(machine):
    machine.process("7:cpu:/x\n4:memory:/a/b", V1_MEMORY.format(root="/"))
    machine.v1("a/b", V1_UNLIMITED, 100 * MIB)
    machine.v1("a", 400 * MIB, 100 * MIB)
    assert room(machine).nbytes == 300 * MIB
    machine.write("sys/fs/cgroup/memory/a/memory.use_hierarchy", 0)
    assert room(machine).source == "available memory"
    machine.write("sys/fs/cgroup/memory/a/b/memory.use_hierarchy", 0)
    machine.write("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", 150 * MIB)
    assert room(machine).nbytes == 50 * MIB  # the group's own limit binds in any case


def test_a_v1_ancestor_outside_the_container_binds_through_the_hierarchical_limit(machine):
    machine.process("4:memory:/", V1_MEMORY.format(root="/"))
    machine.v1("", V1_UNLIMITED, 100 * MIB, hierarchical_memory_limit=700 * MIB)
    got = room(machine)
    assert (got.nbytes, got.source) == (600 * MIB, "cgroup v1 hierarchical_memory_limit of /")


def test_a_limit_on_memory_and_swap_together_binds_when_swap_has_used_it_up(machine):
    machine.process("4:memory:/job", V1_MEMORY.format(root="/"))
    machine.v1("job", 1000 * MIB, 400 * MIB, total_inactive_file=100 * MIB, total_swap=300 * MIB)
    machine.write("sys/fs/cgroup/memory/job/memory.memsw.limit_in_bytes", 1100 * MIB)
    machine.write("sys/fs/cgroup/memory/job/memory.memsw.usage_in_bytes", 900 * MIB)
    got = room(machine)
    assert (got.nbytes, got.source) == (300 * MIB, "cgroup v1 memory.memsw.limit_in_bytes of /job")
    assert got.swap_nbytes == 0


@pytest.mark.parametrize("unlimited", ["max", V1_UNLIMITED, 2**63 - 1])
def test_no_limit_and_a_limit_too_large_to_be_one_are_none(machine, unlimited):
    machine.process("0::/v2\n4:memory:/v1", V2_UNIFIED.format(root="/"), V1_MEMORY.format(root="/"))
    machine.v2("unified/v2", unlimited, 5 * MIB)
    if unlimited != "max":
        machine.v1("v1", unlimited, 5 * MIB)
    assert room(machine).limits == (Limit("available memory", 8000 * MIB, 2000 * MIB),)


def test_memory_high_binds_and_is_marked_soft(machine):
    machine.process("0::/job", V2.format(root="/"))
    machine.v2("job", 1000 * MIB, 100 * MIB, high=800 * MIB)
    got = room(machine)
    assert (got.nbytes, got.source) == (700 * MIB, "cgroup v2 memory.high of /job")
    assert [limit.soft for limit in got.limits] == [True, False, False]


def test_use_above_a_limit_leaves_nothing_rather_than_less(machine):
    machine.process("0::/job", V2.format(root="/"))
    machine.v2("job", 100 * MIB, 130 * MIB)
    assert room(machine).nbytes == 0


def test_both_versions_at_once_are_both_read(machine):
    machine.process("4:memory:/one\n0::/two", V1_MEMORY.format(root="/"), V2_UNIFIED.format(root="/"))
    machine.v1("one", 900 * MIB, 100 * MIB)
    assert room(machine).nbytes == 800 * MIB  # the usual hybrid: version 2 without controllers
    machine.v2("unified/two", 300 * MIB, 100 * MIB)
    assert room(machine).nbytes == 200 * MIB


@pytest.mark.parametrize(
    ("path", "root", "folder"),
    [
        ("/", "/", ""),  # a container with its own namespace
        ("/docker/abc", "/docker/abc", ""),  # without one: the mount shows the container's group
        ("/docker/abc/inner", "/docker/abc", "inner"),  # a group made inside it
        ("/kubepods/pod1/ctr", "/", "kubepods/pod1/ctr"),  # the host
        ("/docker/abc", "/", ""),  # the host's path, but only the container's group is mounted
        ("/../other", "/", ""),  # moved out of its namespace's root
        ("/", "/../..", ""),  # the mount shows ancestors of the namespace's root
        ("/../../job", "/../..", "job"),  # and the process is in one beside it
        ("/job (deleted)", "/", ""),  # the group is gone
        ("/with space:and colon", "/", "with space:and colon"),
    ],
)
def test_the_group_is_found_however_the_container_shows_it(machine, path, root, folder):
    machine.process(f"0::{path}", V2.format(root=root))
    machine.v2(folder, 100 * MIB, 40 * MIB)
    machine.v2("../other", 100 * MIB, 99 * MIB)  # no group: outside the mount
    assert room(machine).nbytes == 60 * MIB


def test_a_foreign_group_mounted_elsewhere_does_not_count(machine):
    foreign = V2.format(root="/foreign").replace("/sys/fs/cgroup ", "/mnt/foreign ")
    machine.process("0::/job", foreign, V2.format(root="/"))
    machine.v2("job", 100 * MIB, 40 * MIB)
    machine.v2("../../../mnt/foreign", 10 * MIB, 9 * MIB)
    assert room(machine).nbytes == 60 * MIB


def test_an_escaped_mount_point_is_found(machine):
    line = r"34 31 0:31 / /mnt/my\040groups rw - cgroup2 cgroup2 rw"
    machine.process("0::/job", line)
    machine.write("mnt/my groups/job/memory.max", 100 * MIB)
    machine.write("mnt/my groups/job/memory.current", 40 * MIB)
    assert room(machine).nbytes == 60 * MIB


def test_torn_and_foreign_lines_are_passed_over(machine):
    machine.process("garbage\n::\n4:memory\n0::/job", "34 31 0:31", "- -", "a b c d e f", V2.format(root="/"))
    machine.v2("job", 100 * MIB, 40 * MIB)
    machine.write("sys/fs/cgroup/job/memory.stat", "inactive_file\nactive_file many\nx 1 2")
    assert room(machine).nbytes == 60 * MIB


def test_swap_left_is_the_least_of_the_machine_and_the_groups_and_is_not_counted(machine):
    machine.process("0::/a/b", V2.format(root="/"))
    machine.v2("a/b", 1000 * MIB, 0)
    machine.write("sys/fs/cgroup/a/memory.swap.max", 90 * MIB)
    machine.write("sys/fs/cgroup/a/memory.swap.current", 20 * MIB)
    got = room(machine)
    assert (got.swap_nbytes, got.nbytes) == (70 * MIB, 1000 * MIB)


def test_an_address_space_limit_counts(machine):
    machine.write("proc/self/status", "Name:\tx\nVmSize:\t 2048 kB\nVmData:\t 1024 kB")
    machine.write(
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max data size             unlimited            unlimited            bytes\n"
        f"Max address space         {5 * MIB}            unlimited            bytes",
    )
    assert (room(machine).nbytes, room(machine).source) == (3 * MIB, "RLIMIT_AS")


def test_page_cache_of_the_own_group_is_told_apart_from_shared_memory(machine):
    assert page_cache_nbytes(machine.root) is None
    machine.process("0::/job", V2.format(root="/"))
    machine.v2("job", "max", 0, file=700, shmem=200)
    assert page_cache_nbytes(machine.root) == 500
    machine.process("4:memory:/job", V1_MEMORY.format(root="/"))
    machine.v1("job", V1_UNLIMITED, 0, cache=1, total_cache=300, total_shmem=100)
    assert page_cache_nbytes(machine.root) == 200


# ---- processors


def test_without_a_quota_the_threads_are_the_processors_allowed(machine):
    got = cpu_count(machine.root, affinity=6)
    assert (got.threads, got.affinity, got.quota) == (6, 6, None)
    assert got.source == "processors this process may use"


@pytest.mark.parametrize(
    ("quota", "threads"), [("250000", 2), ("50000", 1), ("100000", 1), ("400000", 4), ("900000", 6)]
)
def test_a_v2_quota_is_rounded_down_and_never_below_one(machine, quota, threads):
    machine.process("0::/job", V2.format(root="/"))
    machine.write("sys/fs/cgroup/job/cpu.max", f"{quota} 100000")
    assert cpu_count(machine.root, affinity=6).threads == threads


def test_the_least_quota_over_ancestors_counts_and_is_named(machine):
    machine.process("0::/a/b/c", V2.format(root="/"))
    machine.write("sys/fs/cgroup/a/b/c/cpu.max", "max 100000")
    machine.write("sys/fs/cgroup/a/b/cpu.max", "500000 100000")
    machine.write("sys/fs/cgroup/a/cpu.max", "150000 50000")
    got = cpu_count(machine.root, affinity=8)
    assert (got.threads, got.quota, got.source) == (3, 3.0, "cgroup v2 CPU quota 3 of /a")


@pytest.mark.parametrize(("quota", "threads"), [(-1, 8), (0, 8), (200000, 2), (30000, 1)])
def test_a_v1_quota_counts_and_minus_one_is_none(machine, quota, threads):
    machine.process("1:cpu,cpuacct:/job", V1_CPU.format(root="/"))
    machine.write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", quota)
    machine.write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", 100000)
    assert cpu_count(machine.root, affinity=8).threads == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity cannot be set here")
def test_this_process_pinned_to_one_processor_counts_one():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpu_count().affinity == 1
        assert cpu_count().threads == 1
    finally:
        os.sched_setaffinity(0, before)


# ---- the kernel's own groups

REPORT = (
    "import json; from blockstream.system.limits import headroom, cpu_count; h, c = headroom(), cpu_count();"
    "print(json.dumps([h.nbytes, h.source, h.total_nbytes, c.threads, c.quota]))"
)
HOLD = "import sys; x = bytearray(b'x') * (int(sys.argv[1]) << 20); print(len(x) >> 20)"

needs_memory_groups = pytest.mark.skipif(bool(why_not("memory")), reason=why_not("memory") or "")
needs_cpu_groups = pytest.mark.skipif(bool(why_not("cpu")), reason=why_not("cpu") or "")


@needs_memory_groups
def test_a_process_in_a_limited_group_sees_its_limit():
    with limited(memory_nbytes=200 * MIB) as group:
        done = group.run([sys.executable, "-c", REPORT])
    assert done.returncode == 0, done.stderr
    nbytes, source, total, _, _ = json.loads(done.stdout)
    assert total == 200 * MIB
    assert 140 * MIB < nbytes < 200 * MIB
    assert source.startswith("cgroup v") and "blockstream-test-" in source


@needs_memory_groups
def test_page_cache_does_not_shrink_the_headroom(tmp_path):
    file = tmp_path / "read"
    file.write_bytes(bytes(100 * MIB))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    # Pages are charged to the group that brings them in.
    read = f"n = sum(len(b) for b in iter(lambda f=open({str(file)!r}, 'rb', 0): f.read(1 << 20), b''));"
    with limited(memory_nbytes=200 * MIB) as group:
        done = group.run([sys.executable, "-c", f"{read} assert n == {100 * MIB}; {REPORT}"])
        charged = group.peak_nbytes
    assert done.returncode == 0, done.stderr
    assert charged > 100 * MIB
    assert json.loads(done.stdout)[0] > 140 * MIB


@needs_memory_groups
def test_the_kernel_kills_what_is_above_the_limit_and_lets_be_what_is_within():
    with limited(memory_nbytes=100 * MIB) as group:
        within = group.run([sys.executable, "-c", HOLD, "60"])
        above = group.run([sys.executable, "-c", HOLD, "120"])
    assert (within.returncode, within.stdout) == (0, "60\n")
    assert (above.returncode, above.stdout) == (-9, "")


@needs_memory_groups
def test_a_limit_may_move_while_a_process_runs_and_the_group_is_gone_afterwards():
    with limited(memory_nbytes=50 * MIB) as group:
        group.set_memory(150 * MIB)
        assert group.run([sys.executable, "-c", HOLD, "100"]).returncode == 0
        group.set_memory(60 * MIB)
        assert group.run([sys.executable, "-c", HOLD, "100"]).returncode == -9
        folders = list(group.folders.values())
    assert not any(folder.exists() for folder in folders)


@needs_cpu_groups
def test_a_process_under_a_cpu_quota_counts_fewer_threads():
    with limited(cpus=1.5) as group:
        done = group.run([sys.executable, "-c", REPORT])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[3:] == [1, 1.5]
