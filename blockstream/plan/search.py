"""What a stage may retain in how many slots, ranked by the time it would take.

Pure. A candidate is a policy's choice for one slot count; `estimate` ranks them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from blockstream.errors import BudgetError

from . import simulate
from .layout import align_up, slot_room
from .retention import RetentionPolicy
from .segments import Stage

#: Slot counts the planner tries; more than eight never paid in simulation or in practice.
SLOT_COUNTS = (2, 3, 4, 6, 8)
#: Slot counts whose times differ by no more are as fast, for all a prediction knows: the fewest bytes win.
CLOSE = 1.01


@dataclass(frozen=True)
class Candidate:
    """One way to run a stage: the policy, its slots, the segments it retains."""

    policy: str
    slots: int
    retained: tuple[int, ...]


@dataclass(frozen=True)
class Ranked:
    """A candidate and what it costs: seconds, bytes read, the room of its slots."""

    candidate: Candidate
    wall_s: float
    read_nbytes: int
    room: int

    @property
    def rank(self) -> tuple[float, int, int]:
        """Return what candidates are compared by: the time first, then the bytes read, then the room."""
        return round(self.wall_s, 9), self.read_nbytes, self.room


@dataclass(frozen=True)
class Limits:
    """What every candidate keeps to: the bytes of the arena, a fixed slot count and lookahead if any."""

    arena_nbytes: int
    slots: int | None
    lookahead: int | None
    align: int


def best_of_policy(
    stage: Stage, policy: RetentionPolicy, limits: Limits, there: Collection[int] = ()
) -> Ranked:
    """Return the policy's best slot count for one stage: by the recurrence the fastest, by `CLOSE`.

    `there` are segments in memory already: to retain them costs no read. Raises BudgetError, naming
    the least arena, when none fits.
    """
    ranked = []
    for candidate in _candidates(stage, policy, limits, there):
        keep = frozenset(candidate.retained)
        estimate = simulate.estimate(stage, keep, candidate.slots, limits.lookahead, there)
        room = slot_room(stage, keep, candidate.slots, limits.align)
        ranked.append(Ranked(candidate, estimate.wall_s, estimate.read_nbytes, room))
    if not ranked:
        raise _too_small(stage, limits)
    close = CLOSE * min(r.wall_s for r in ranked)
    return min((r for r in ranked if r.wall_s <= close), key=lambda r: (r.read_nbytes, *r.rank))


def least_of(stage: Stage, slots: int | None, align: int) -> tuple[int, int, int]:
    """Return (least arena, resident bytes, bytes of the slots) of one stage."""
    resident = _resident(stage)
    held = sum(align_up(stage.segments[i].nbytes, align) for i in resident)
    keep = frozenset(resident)
    room = slot_room(stage, keep, slots or SLOT_COUNTS[0], align)
    return min(held + room, _everything(stage, align)), held, room


def _everything(stage: Stage, align: int) -> int:
    """Return the arena in which all that is used again stays, beside slots for the rest."""
    lasting = _lasting(stage)
    spare = slot_room(stage, frozenset(lasting), SLOT_COUNTS[0], align)
    return sum(align_up(stage.segments[i].nbytes, align) for i in lasting) + spare


def _lasting(stage: Stage) -> tuple[int, ...]:
    return tuple(i for i in stage.visited if i not in stage.once)


def _resident(stage: Stage) -> list[int]:
    return [i for i in _lasting(stage) if stage.segments[i].resident]


def _candidates(
    stage: Stage, policy: RetentionPolicy, limits: Limits, there: Collection[int]
) -> Iterator[Candidate]:
    resident = _resident(stage)
    padded = _padded(stage, limits.align)
    held = sum(padded.segments[i].nbytes for i in resident)
    everything = Candidate(policy.name, limits.slots or SLOT_COUNTS[0], _lasting(stage))
    all_fit = _everything(stage, limits.align) <= limits.arena_nbytes
    if all_fit and policy.retains:
        yield everything
        return
    fitting = 0
    for count in [limits.slots] if limits.slots else SLOT_COUNTS:
        least = slot_room(stage, frozenset(resident), count, limits.align)
        if held + least > limits.arena_nbytes:
            break
        keep = _retain(policy, padded, resident, count, limits.arena_nbytes)
        if fitting and count > len(stage.order) - len(keep):
            break  # no more slots than loads a pass
        fitting += 1
        yield Candidate(policy.name, count, keep)
        if there and policy.adjust is not None:
            yield Candidate(
                policy.name, count, _retain(policy, padded, resident, count, limits.arena_nbytes, there)
            )
    if all_fit and not fitting:  # a stage smaller than its own two slots
        yield everything


def _retain(
    policy: RetentionPolicy,
    padded: Stage,
    resident: Sequence[int],
    slots: int,
    arena_nbytes: int,
    there: Collection[int] = (),
) -> tuple[int, ...]:
    """Return what a policy retains beside `slots` slots, resident segments first.

    What is retained changes which loads are neighbours, and so the room of the slots: it is sized for
    all streamed first, then, should that not hold, for slots of the largest segment.
    """
    if not policy.retains:
        return tuple(resident)
    held = sum(padded.segments[i].nbytes for i in resident)
    largest = max((padded.segments[i].nbytes for i in padded.visited), default=0)
    for room in (slot_room(padded, frozenset(resident), slots, 1), slots * largest):
        left = arena_nbytes - held - room
        chosen: Sequence[int] = ()
        if left > 0 and there and policy.adjust is not None:
            chosen = policy.adjust(padded, left, there)
        elif left > 0:
            chosen = policy.retain(padded, left)
        keep = tuple(dict.fromkeys([*resident, *chosen]))
        kept = sum(padded.segments[i].nbytes for i in keep)
        if kept + slot_room(padded, frozenset(keep), slots, 1) <= arena_nbytes:
            return keep
    return tuple(resident)


def _padded(stage: Stage, align: int) -> Stage:
    """Return the stage with every segment at the room its extent takes."""
    segments = tuple(replace(s, nbytes=align_up(s.nbytes, align)) for s in stage.segments)
    return replace(stage, segments=segments)


def _too_small(stage: Stage, limits: Limits) -> BudgetError:
    least, held, _ = least_of(stage, limits.slots, limits.align)
    largest = max((stage.segments[i] for i in stage.visited), key=lambda s: s.nbytes)
    return BudgetError(
        f"an arena of {limits.arena_nbytes:,} bytes cannot hold {limits.slots or SLOT_COUNTS[0]} slots of "
        f"stage {stage.name!r} (largest segment {largest.name!r}, {largest.nbytes:,} bytes) beside "
        f"{held:,} bytes that stay resident; the least is {least:,} bytes"
    )
