"""What more memory would buy: predicted time against budget, from the least that works to all resident.

Pure: the planner is asked at some arenas between the two, and never believed when it does worse with more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from blockstream.budget.amounts import format_nbytes
from blockstream.plan.layout import ALIGN, align_up
from blockstream.plan.planner import Plan, least_arena, make_plan
from blockstream.plan.retention import POLICIES, RetentionPolicy
from blockstream.plan.segments import Schedule
from blockstream.plan.simulate import Prediction

#: Arenas the planner is asked at; each costs it a simulation or four.
POINTS = 9
#: Points shown at most, and by how much of the time, or of the bytes, each differs from the one before.
SHOWN, SHOWN_TIME, SHOWN_NBYTES = 8, 0.02, 0.05
#: A gain below this part of the time is none.
NOTHING = 0.002


@dataclass(frozen=True)
class Point:
    """What an arena of so many bytes comes to: predicted seconds, and bytes read in all."""

    arena_nbytes: int
    predicted_s: float
    read_nbytes: int


def budget_curve(
    schedule: Schedule,
    policies: Sequence[RetentionPolicy] = POLICIES,
    *,
    slots: int | None = None,
    lookahead: int | None = None,
    points: int = POINTS,
    also: Iterable[int] = (),
    predicted: Callable[[Plan], Prediction] = lambda plan: plan.predicted,
) -> list[Point]:
    """Return the curve in growing arenas; time and reads never grow with memory.

    `also` are arenas to ask at besides, `predicted` says what a plan of one comes to.
    More memory than a point's may be planned worse by a rule of thumb, but the smaller plan still fits.
    """
    whole = sorted(sum(align_up(s.segments[i].nbytes) for i in s.visited) for s in schedule.stages)
    least, most = least_arena(schedule, slots), whole[-1]
    asked: dict[int, Point] = {}

    def ask(arena: int) -> None:
        if arena not in asked:
            plan = make_plan(schedule, arena, policies, slots=slots, lookahead=lookahead)
            shown = predicted(plan)
            asked[arena] = Point(arena, shown.wall_s, shown.read_nbytes)

    for arena in [least, *(w for w in (*whole, *also) if w > least), *_between(least, most, points // 3)]:
        ask(arena)
    # Most of the range is often flat: the rest of the points go where the time still changes.
    for _ in range(2):
        flat = enough(_falling(asked.values()))
        below = max((a for a in asked if a < flat.arena_nbytes), default=least)
        ask(align_up((below + flat.arena_nbytes) // 2))
    upto = enough(_falling(asked.values())).arena_nbytes
    for arena in _between(least, upto, points - len(asked)):
        ask(arena)
    return _falling(asked.values())


def _between(least: int, most: int, n: int) -> list[int]:
    """Return `n` arenas between two, rounded up to whole pages."""
    return [align_up(least + (most - least) * k // (n + 1), ALIGN) for k in range(1, n + 1)]


def _falling(points: Iterable[Point]) -> list[Point]:
    """Return the points by size, none slower than a smaller one."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: p.arena_nbytes):
        if found and point.predicted_s > found[-1].predicted_s:
            point = replace(found[-1], arena_nbytes=point.arena_nbytes)
        found.append(point)
    return found


def shown(points: Sequence[Point], budget_of: Callable[[int], int]) -> list[Point]:
    """Return the points that tell something: at most eight, with the least and the knee.

    Each of the others takes 2% less time than the point before it, or 5% more bytes as a budget.
    """
    bend = knee(points)
    found = [points[0]]
    for point in points[1:]:
        before = found[-1]
        faster = point.predicted_s < (1 - SHOWN_TIME) * before.predicted_s
        larger = budget_of(point.arena_nbytes) > (1 + SHOWN_NBYTES) * budget_of(before.arena_nbytes)
        if point == bend and not (faster or larger) and before != points[0]:
            found.pop()
        if faster or larger or point == bend:
            found.append(point)
    while len(found) > SHOWN:
        inner = [i for i in range(1, len(found) - 1) if found[i] != bend]
        least = min(inner, key=lambda i: found[i - 1].predicted_s - found[i + 1].predicted_s)
        del found[least]
    return found


def knee(points: Sequence[Point]) -> Point | None:
    """Return the point farthest below the line from the first to the first that is enough.

    Past it, memory buys less. Without a bend it is where the curve turns flat; None for one that is all flat.
    """
    first, last = points[0], enough(points)
    wide, high = last.arena_nbytes - first.arena_nbytes, first.predicted_s - last.predicted_s
    if wide <= 0 or high <= NOTHING * first.predicted_s:
        return None

    def below(p: Point) -> float:
        return (first.predicted_s - p.predicted_s) / high - (p.arena_nbytes - first.arena_nbytes) / wide

    best = max((p for p in points if p.arena_nbytes <= last.arena_nbytes), key=below)
    return best if below(best) > 0.05 else last


def enough(points: Sequence[Point]) -> Point:
    """Return the first point that no later one beats by more than nothing."""
    target = points[-1].predicted_s * (1 + NOTHING)
    return next(p for p in points if p.predicted_s <= target)


def advice(
    points: Sequence[Point], budget_of: Callable[[int], int], least_nbytes: int | None = None
) -> list[str]:
    """Return what the curve says in sentences; `budget_of` turns an arena into a budget.

    `least_nbytes` is the least budget, where it is known to be a little less than the curve's first.

    "3.3 GiB: 212 s, the least that works", "+1.0 GiB saves 31 s (the knee)", "beyond 6.1 GiB nothing".
    """
    first, last, bend = points[0], enough(points), knee(points)
    least_nbytes = budget_of(first.arena_nbytes) if least_nbytes is None else least_nbytes
    least = f"{format_nbytes(least_nbytes, up=True)}: {seconds(first.predicted_s)}"
    if last == first:
        return [f"{least}, the least that works; more memory saves nothing"]
    said = [f"{least}, the least that works"]
    stops = dict.fromkeys([first, bend or last, last])
    for before, after in pairwise(stops):
        more = budget_of(after.arena_nbytes) - budget_of(before.arena_nbytes)
        saved = seconds(before.predicted_s - after.predicted_s)
        said.append(f"+{format_nbytes(more)} saves {saved}{' (the knee)' if after is bend else ''}")
    return [*said, f"beyond {format_nbytes(budget_of(last.arena_nbytes), up=True)} nothing"]


def seconds(s: float) -> str:
    """Return a time for people: 0.42 s, 12.3 s, 212 s, 1 h 05 min."""
    if s < 10:
        return f"{s:.2f} s"
    if s < 100:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{s:.0f} s"
    hours, rest = divmod(round(s / 60), 60)
    return f"{hours} h {rest:02} min"
