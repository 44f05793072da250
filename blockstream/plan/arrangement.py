"""Where every load of a schedule goes and what stays: what the scheduler follows."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import StageLayout
from .segments import Extent, Schedule, Visit


@dataclass(frozen=True)
class StagePlan:
    """How one stage runs: the policy that won, the segments it retains, slots and extents."""

    policy: str
    slots: int
    layout: StageLayout

    @property
    def retained(self) -> tuple[int, ...]:
        """Return the indices of the retained segments, resident ones included, in layout order."""
        return tuple(self.layout.retained)


@dataclass(frozen=True)
class Arrangement:
    """A schedule laid out in one arena. `arena_nbytes` is the exact peak of the extents it uses.

    `lookahead` bounds how many visits past the one computing may be loaded (None: as the slots
    allow; 1: the paper's concurrent inference). With `keeps` stages lie beside one another, and what one
    retains stays when it is over.
    """

    schedule: Schedule
    stages: tuple[StagePlan, ...]
    arena_nbytes: int
    lookahead: int | None = None
    keeps: bool = False

    def extent(self, visit: Visit) -> Extent:
        """Return where the segment of a visit lies in the arena."""
        return self.stages[visit.stage].layout.extent(visit.pass_index, visit.position)

    def is_retained(self, visit: Visit) -> bool:
        """Return whether the segment of a visit stays across passes."""
        stage = self.schedule.stages[visit.stage]
        return stage.index_at(visit.position) in self.stages[visit.stage].layout.retained

    @property
    def retains_all(self) -> bool:
        """Return whether every stage keeps all it visits."""
        pairs = zip(self.schedule.stages, self.stages, strict=True)
        return all(set(stage.visited) - stage.once <= set(planned.retained) for stage, planned in pairs)
