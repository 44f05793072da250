"""One load of a segment, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .segments import Extent, Segment, Visit


@dataclass(frozen=True, eq=False, slots=True)
class Load:
    """One load: the visit it is for, where its bytes go, whether it stays across passes.

    `stage` is the stage's name, `key` (stage, index of the segment): positions change their meaning with the
    order of a plan. Compared by identity: a visit whose load was dropped may be loaded again.
    """

    stage: str
    visit: Visit
    key: tuple[int, int]
    segment: Segment
    extent: Extent
    retained: bool


class State(Enum):
    """The life of a load; LOADING loads that nobody wants any more are DROPPED."""

    LOADING = "loading"
    READY = "ready"
    ACQUIRED = "acquired"
    DROPPED = "dropped"
