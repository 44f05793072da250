"""A device over host memory: the engine below, both arenas, the store between them, and the budget above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blockstream.checkpoint.file_store import FileStore
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.engine.loader import Lanes
from blockstream.engine.spans import Span
from blockstream.plan.tiers import Tiers
from blockstream.system.limits import cpu_count

from .budget import DeviceBudget
from .protocol import Device
from .rooms import DeviceArena, DeviceLayout, PinnedArena
from .track import DeviceTrack
from .upload import UploadStore


class DeviceTier:
    """What lies below the engine of a device. `store` is that engine's, `arena` where its segments lie.

    `start` touches host memory, and registers it while it is read into; closing `store` ends the engine
    below.
    """

    def __init__(
        self,
        device: Device,
        budget: DeviceBudget,
        tiers: Tiers,
        host: Arena,
        files: FileStore,
        ledger: Ledger,
        on_loaded: Callable[[Span], None] | None = None,
    ) -> None:
        self.device, self.budget = device, budget
        self._files, self._nbytes = files, tiers.host.arena_nbytes
        self._layouts = {
            (stage, name): DeviceLayout.of(layout)
            for stage, layouts in files.stages.items()
            for name, layout in layouts.items()
        }
        budget.enforce()
        self.arena = DeviceArena(device, tiers.device.arena_nbytes)
        budget.weights_nbytes = tiers.device.arena_nbytes
        pinned = PinnedArena(host, device)
        engine = Engine(tiers.host, files, ledger, on_loaded=on_loaded, lanes=Lanes(compute=""))
        self.track = DeviceTrack(device, ledger)
        self.store = UploadStore(engine, pinned, device, self.arena, self._layouts, self.track)

    def layouts(self, stage: str) -> Mapping[str, DeviceLayout]:
        """Return where the tensors of a stage's segments lie on the device, by segment."""
        return {name: layout for (of, name), layout in self._layouts.items() if of == stage}

    def start(self) -> None:
        """Begin to register host memory, and to read into it meanwhile; the first copy waits for both."""
        self.store.pinned.begin(self._nbytes, cpu_count().threads)
        self.store.host.start()

    def close(self) -> None:
        """Close the files and take the limit off the allocator. After the store."""
        self.budget.sample()
        self.track.resolve()
        self._files.close()
        self.device.limit(self.device.memory().total_nbytes)

    def report(self) -> dict[str, Any]:
        """Return what report.json says of the device."""
        self.track.resolve()
        pinned = self.store.pinned
        pinned.settle()
        host = self.store.host.plan
        return {
            **self.budget.report(),
            "copied_nbytes": self.store.copied_nbytes,
            "pinned_nbytes": pinned.registered_nbytes,
            "pageable": pinned.refused,
            "host": {
                "arena_nbytes": host.arena_nbytes,
                "retained": [len(x.layout.retained) for x in host.stages],
                "retained_nbytes": sum(
                    host.schedule.stages[n].segments[i].copied_nbytes
                    for n, x in enumerate(host.stages)
                    for i in x.layout.retained
                ),
                "unplanned": self.store.host.unplanned,
            },
        }
