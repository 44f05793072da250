"""A device's tier over the host's: segments go from files into host memory, and on into the device's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blockstream.device.budget import DeviceBudget
from blockstream.device.tier import DeviceTier
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.engine.loader import Lanes
from blockstream.engine.spans import Span
from blockstream.module.binding import Binding, BindingStore, address_of
from blockstream.plan.tiers import Tiers

from .declared import Declared
from .shelves import Shelves
from .top_tier import OnSpan, forget_all, open_files, unbind_all


class TowerTier:
    """The engine of a device, whose store is the engine of host memory. A `TopTier`."""

    def __init__(
        self,
        tiers: Tiers,
        budget: DeviceBudget,
        stages: Sequence[Declared],
        ledger: Ledger,
        on_loaded: OnSpan | None = None,
        on_executed: OnSpan | None = None,
    ) -> None:
        self.where = budget.device.where
        self.arena = Arena(tiers.host.arena_nbytes)
        self.files = open_files(self.arena, stages)
        self.shelves = Shelves((), self.arena, 0)  # a device's experts are read whole
        self.below = DeviceTier(budget.device, budget, tiers, self.arena, self.files, ledger, on_loaded)
        self._bindings: dict[tuple[str, str], Binding] = {}
        for stage in stages:
            layouts = self.below.layouts(stage.name)
            self._bindings.update(stage.prepared.bindings(self.below.arena, layouts))
        self._store = BindingStore(self.below.store, self._bindings)
        track = self.below.track

        def executed(span: Span) -> None:
            track.executed(span)
            if on_executed is not None:
                on_executed(span)

        lanes = Lanes(loader="uploader", load="fetch")
        self.engine = Engine(tiers.device, self._store, ledger, on_executed=executed, lanes=lanes)
        self._closed = False

    def start(self) -> None:
        """Register host memory with the device and begin to read."""
        self.below.start()
        self.engine.start()

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory is that of weights on the device."""
        address = address_of(tensor)
        return address is not None and 0 <= address - self.below.arena.address < self.below.arena.nbytes

    def unbind(self) -> None:
        """Put stand-ins back for whatever is bound."""
        unbind_all(self._bindings)

    def forget(self) -> None:
        """Drop the views of the device's memory."""
        forget_all(self._bindings)

    def close(self) -> None:
        """Stop copying and reading, release every segment, close the files. Idempotent."""
        first, self._closed = not self._closed, True
        try:
            self.engine.close()
        finally:
            self._store.close()
            if first:
                self.below.close()

    def device_report(self) -> Mapping[str, Any]:
        """Return what report.json says of the device: its name, its budget and what was copied there."""
        return self.below.report()
