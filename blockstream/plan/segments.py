"""What is loaded, used and released: segments, the stages that visit them, the schedule of stages.

Everything here is an immutable value. Names are the field's: a *segment* is loaded and released
together, a *pass* is one forward of a stage, a *visit* is one segment in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple


class Extent(NamedTuple):
    """A range of bytes of the arena."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Return the first byte after the extent."""
        return self.offset + self.nbytes

    def overlaps(self, other: Extent) -> bool:
        """Return whether the two extents share a byte."""
        return max(self.offset, other.offset) < min(self.end, other.end)


class Visit(NamedTuple):
    """One segment in one pass: the key of a load. Visits sort in the order they run.

    `position` indexes `Stage.order`; `len(order) + i` is an unplanned visit of segment i. `stage`
    indexes `Schedule.stages`.
    """

    stage: int
    pass_index: int
    position: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What is loaded and released together.

    `nbytes` is the room it needs in the arena, `read_nbytes` what one load reads from storage
    (`nbytes` when None), `load_s` and `execute_s` the seconds one load and one visit take. A device holds
    `copied_nbytes` of it, which take `copy_s` over the link.
    A `resident` segment stays from its first visit to the end of its stage whatever the policy.
    """

    name: str
    nbytes: int
    load_s: float = 0.0
    execute_s: float = 0.0
    read_nbytes: int | None = None
    resident: bool = False
    copied_nbytes: int = 0
    copy_s: float = 0.0

    def __post_init__(self) -> None:
        if self.nbytes < 0 or self.load_s < 0 or self.execute_s < 0:
            raise ValueError(
                f"segment {self.name!r}: nbytes {self.nbytes}, load_s {self.load_s} and "
                f"execute_s {self.execute_s} must not be negative"
            )

    @property
    def streamed_nbytes(self) -> int:
        """Return the bytes one load reads from storage."""
        return self.nbytes if self.read_nbytes is None else self.read_nbytes


@dataclass(frozen=True, slots=True)
class _Bounded:
    passes: int

    @property
    def most(self) -> int | None:
        """Return the largest possible number of passes, None when unbounded."""
        return self.passes

    @property
    def expected(self) -> int:
        """Return the number of passes predictions are made for."""
        return self.passes


@dataclass(frozen=True, slots=True)
class Exactly(_Bounded):
    """A number of passes known beforehand."""


@dataclass(frozen=True, slots=True)
class AtMost(_Bounded):
    """An upper bound: a sampler may end the stage earlier, and says so in its last pass."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """No bound: the stage runs until it is ended (`generate()`).

    `expected` is only a guess: by default enough for what is kept to pay.
    """

    expected: int = 8

    @property
    def most(self) -> int | None:
        """Return the largest possible number of passes, None when unbounded."""
        return None


Passes = Exactly | AtMost | Unknown


@dataclass(frozen=True)
class Stage:
    """One network of the pipeline: its segments, the order of one pass, the number of passes.

    `order` holds indices into `segments`; one that occurs twice is visited twice in a pass, one that
    does not occur is loaded only if compute asks for it. `pace` holds how much longer than
    `Segment.execute_s` the visits of each pass take, as a factor; 1 for the passes it leaves out.
    The segments in `once` are visited in the first pass alone: a tier above keeps them from then on.
    """

    name: str
    segments: tuple[Segment, ...]
    order: tuple[int, ...] = ()
    passes: Passes = field(default_factory=lambda: Exactly(1))
    pace: tuple[float, ...] = ()
    once: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"stage {self.name!r} has no segments")
        if not self.order:
            object.__setattr__(self, "order", tuple(range(len(self.segments))))
        wrong = [i for i in self.order if not 0 <= i < len(self.segments)]
        if wrong:
            raise ValueError(
                f"stage {self.name!r}: order names segments {wrong[:5]}, there are {len(self.segments)}"
            )
        if self.passes.expected < 0:
            raise ValueError(f"stage {self.name!r}: {self.passes.expected} passes")
        if any(not factor > 0 for factor in self.pace):
            raise ValueError(f"stage {self.name!r}: pace {self.pace[:5]} holds factors that are not above 0")

    @cached_property
    def visited(self) -> tuple[int, ...]:
        """Return the segments a pass visits, each once, in the order of their first visit."""
        return tuple(dict.fromkeys(self.order))

    @cached_property
    def _later(self) -> tuple[int, ...]:
        return tuple(k for k, i in enumerate(self.order) if i not in self.once)

    def positions(self, pass_index: int) -> Sequence[int]:
        """Return the positions that a pass visits, in order."""
        return self._later if pass_index and self.once else range(len(self.order))

    def is_visited(self, pass_index: int, position: int) -> bool:
        """Return whether a pass visits a position of the order."""
        return pass_index == 0 or not self.once or self.order[position] not in self.once

    def position_from(self, pass_index: int, position: int) -> int | None:
        """Return the first position from one on that a pass visits, None when none is left."""
        for k in range(position, len(self.order)):
            if self.is_visited(pass_index, k):
                return k
        return None

    @cached_property
    def execute_s(self) -> float:
        """Return the seconds of compute in one pass of pace 1."""
        return sum(self.segments[i].execute_s for i in self.order)

    def pace_of(self, pass_index: int) -> float:
        """Return how much longer than `Segment.execute_s` the visits of a pass take."""
        return self.pace[pass_index] if pass_index < len(self.pace) else 1.0

    def paces(self, passes: int) -> list[tuple[float, int]]:
        """Return the paces of the first passes, each with how many follow one another at it."""
        return [(pace, len(list(run))) for pace, run in groupby(map(self.pace_of, range(passes)))]

    @cached_property
    def nbytes(self) -> int:
        """Return the room of all visited segments together."""
        return sum(self.segments[i].nbytes for i in self.visited)

    @cached_property
    def unvisited(self) -> tuple[int, ...]:
        """Return the segments that the order leaves out."""
        return tuple(sorted(set(range(len(self.segments))) - set(self.order)))

    def index_at(self, position: int) -> int:
        """Return the index of the segment at a position; positions past the order are unplanned visits."""
        if position < len(self.order):
            return self.order[position]
        return position - len(self.order)

    def segment(self, position: int) -> Segment:
        """Return the segment visited at a position of the pass."""
        return self.segments[self.index_at(position)]


@dataclass(frozen=True)
class Schedule:
    """The stages in the order they run."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a schedule needs a stage")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> Schedule:
        """Return the schedule of some stages."""
        return cls(tuple(stages))

    def index(self, name: str) -> int:
        """Return the index of the stage of that name; KeyError names the ones there are."""
        for i, stage in enumerate(self.stages):
            if stage.name == name:
                return i
        raise KeyError(f"no stage {name!r}; there are {[s.name for s in self.stages]}")

    def segment(self, visit: Visit) -> Segment:
        """Return the segment of a visit."""
        return self.stages[visit.stage].segment(visit.position)

    def visits(self) -> Iterator[Visit]:
        """Yield the visits of the expected passes in the order they run."""
        for s, stage in enumerate(self.stages):
            for p in range(stage.passes.expected):
                for k in stage.positions(p):
                    yield Visit(s, p, k)
