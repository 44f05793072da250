"""The energy that processors and GPUs took, where the system tells: RAPL by powercap, NVML. Only read.

What is counted is the whole machine's, whatever else ran on it. Most machines let only root read RAPL;
without `pynvml` (pip install nvidia-ml-py) GPUs tell nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from blockstream.plugins import hookimpl

from . import regular

POWERCAP = Path("/sys/class/powercap")
#: A counter of a busy server wraps after half an hour: it is read more often than that.
EVERY_S = 60.0


class Counter(Protocol):
    """What counts joules upwards."""

    @property
    def name(self) -> str:
        """Return what it counts."""

    @property
    def wraps_j(self) -> float:
        """Return where it begins anew; 0 for one that does not."""

    def joules(self) -> float:
        """Return where it stands. Raises OSError when it cannot be read any more."""


class Zone(NamedTuple):
    """A RAPL zone: a processor's package, or the memory at it."""

    name: str
    path: Path
    wraps_j: float

    def joules(self) -> float:
        """Return where the zone's counter stands."""
        return int(regular.read_text(self.path / "energy_uj")) / 1e6


def zones(root: Path = POWERCAP) -> list[Counter]:
    """Return the zones that can be read: packages, and memory that is in no package's count."""
    found: list[Counter] = []
    for path in sorted(root.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            kind = regular.read_text(path / "name").strip()
            if kind.startswith("package") or kind == "dram":
                wraps = int(regular.read_text(path / "max_energy_range_uj")) / 1e6
                zone = Zone(f"{kind} ({path.name.partition(':')[2]})", path, wraps)
                zone.joules()
                found.append(zone)
    return found


class Gpu:
    """A GPU's counter by NVML."""

    wraps_j = 0.0

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        named = nvml.nvmlDeviceGetName(self._handle)
        self.name = f"{named.decode() if isinstance(named, bytes) else named} ({index})"

    def joules(self) -> float:
        """Return the energy since the driver was loaded."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error


def gpus() -> list[Counter]:
    """Return the GPUs that tell their energy; none without NVML."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no such package, no driver, no GPU: nothing is told
        return []
    found: list[Counter] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        with suppress(OSError, nvml.NVMLError):
            gpu = Gpu(nvml, index)
            gpu.joules()
            found.append(gpu)
    return found


class EnergyMeter:
    """Sums counters up from its making on; an observer of a run, so that none wraps unseen.

    A counter that fails is left out from then on, with what it counted. Used by the thread that computes.
    """

    def __init__(
        self, counters: list[Counter] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = [*zones(), *gpus()] if counters is None else counters
        self._clock = clock
        self._began_s = self._last_s = clock()
        self._at: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self.sample()

    @property
    def measures(self) -> bool:
        """Return whether anything tells its energy."""
        return bool(self._counters)

    @hookimpl
    def segment_executed(self) -> None:
        """Read the counters once a minute."""
        if self._clock() - self._last_s >= EVERY_S:
            self.sample()

    def sample(self) -> None:
        """Read the counters."""
        self._last_s = self._clock()
        for counter in list(self._counters):
            try:
                at = counter.joules()
            except (OSError, ValueError):
                self._counters.remove(counter)
                self._took.pop(counter.name, None)
                continue
            more = at - self._at.get(counter.name, at)
            self._at[counter.name] = at
            self._took[counter.name] = self._took.get(counter.name, 0.0) + (
                more if more >= 0 else more + counter.wraps_j
            )

    def account(self) -> dict[str, Any] | None:
        """Return the joules so far, in all and by source, and the watts on average; None: not measured."""
        self.sample()
        if not self._took:
            return None
        joules = sum(self._took.values())
        took_s = self._last_s - self._began_s
        return {
            "joules": joules,
            "watts": joules / took_s if took_s > 0 else None,
            "by_source": dict(self._took),
        }
