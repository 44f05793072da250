"""A made-up machine: a folder with a /proc and a /sys that the code under test is rooted at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

V1_UNLIMITED = 9223372036854771712

V1_MEMORY = "32 31 0:29 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "34 31 0:31 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V2_UNIFIED = "35 31 0:32 {root} /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw"


@dataclass(frozen=True)
class Machine:
    """The root folder of the machine; files are written below it."""

    root: Path

    def write(self, path: str, text: object) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def process(self, cgroup: str, *mounts: str) -> Machine:
        """Write /proc/self/cgroup and /proc/self/mountinfo."""
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "\n".join(["22 27 0:21 / /proc rw - proc proc rw", *mounts]))
        return self

    def v1(self, folder: str, limit: int, usage: int, **stat: int) -> None:
        """Write the memory files of a version 1 group."""
        at = f"sys/fs/cgroup/memory/{folder}"
        self.write(f"{at}/memory.limit_in_bytes", limit)
        self.write(f"{at}/memory.usage_in_bytes", usage)
        self.write(f"{at}/memory.stat", "\n".join(f"{k} {v}" for k, v in stat.items()))
        self.write(f"{at}/memory.use_hierarchy", 1)

    def v2(self, folder: str, limit: int | str, usage: int, high: int | str = "max", **stat: int) -> None:
        """Write the memory files of a version 2 group."""
        at = f"sys/fs/cgroup/{folder}"
        self.write(f"{at}/memory.max", limit)
        self.write(f"{at}/memory.high", high)
        self.write(f"{at}/memory.current", usage)
        self.write(f"{at}/memory.stat", "\n".join(f"{k} {v}" for k, v in stat.items()))
