"""The processor's tier: files are read into one arena, whose views are bound as parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.engine.store import StagesStore
from blockstream.module.binding import Binding, BindingStore, HostRooms, address_of
from blockstream.module.prepared import CPU
from blockstream.plan.layout import align_up
from blockstream.plan.planner import Plan

from .declared import Declared
from .shelves import Shelves, address_space
from .top_tier import OnSpan, forget_all, open_files, unbind_all


class HostTier:
    """An arena in host memory, the files that fill it, the engine that runs its plan. A `TopTier`."""

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[Declared],
        ledger: Ledger,
        on_loaded: OnSpan | None = None,
        on_executed: OnSpan | None = None,
    ) -> None:
        self.where = CPU
        most = sum(align_up(s.nbytes) for x in plan.schedule.stages for s in x.segments)
        most = max(most, align_up(plan.arena_nbytes))
        beside, least = address_space(stages)
        # Address space for all that could be retained, and for its experts.
        self.arena = Arena.reserve(most + beside, align_up(plan.arena_nbytes) + least)
        #: The bytes of the arena that plans may use.
        self.plannable_nbytes = most if self.arena.nbytes >= most + beside else align_up(plan.arena_nbytes)
        self.shelves = Shelves(stages, self.arena, self.plannable_nbytes)
        self.files = open_files(self.arena, stages)
        self._bindings: dict[tuple[str, str], Binding] = {}
        for stage in stages:
            self._bindings.update(stage.prepared.bindings(HostRooms(self.arena)))
        own = {s.name: s.around for s in stages if s.around is not None}
        self._store = BindingStore(StagesStore(self.files, own), self._bindings)
        self.engine = Engine(plan, self._store, ledger, on_loaded=on_loaded, on_executed=on_executed)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory is the arena's."""
        address = address_of(tensor)
        return address is not None and 0 <= address - self.arena.address < self.arena.nbytes

    def unbind(self) -> None:
        """Put stand-ins back for whatever is bound."""
        unbind_all(self._bindings)
        self.shelves.forget()

    def forget(self) -> None:
        """Drop the views of the arena."""
        forget_all(self._bindings)
        self.shelves.forget()

    def close(self) -> None:
        """Stop reading, release every segment, close the files. Idempotent."""
        try:
            self.engine.close()
        finally:
            self._store.close()
            self.shelves.close()

    def device_report(self) -> None:
        """Return nothing: there is no device."""
        return
