"""What loads and computes of a stage cost: as known before it runs, and as measured when it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.plan.segments import Segment, Stage

from .known import OUTSIDE, READ_SPEED
from .stage_facts import Facts

#: Bytes a second, before anything has been measured: half as slow as a common disk reads.
COMPUTE_SPEED = 2.4e9
#: What following a visit takes: its weights are bound, looked after and let go.
VISIT_S = 5e-4
#: Loads of a segment from which on its own times say more than those of all segments of its size.
ENOUGH = 5


def default_costs(facts: Facts) -> Stage:
    """Return a stage with the costs known before it runs."""
    cut = facts.cut
    known = facts.known.of_cut({name: layout.nbytes for name, layout in cut.layouts.items()})
    outside = _outside_s(facts)
    visits = len(facts.full_order) - len(facts.order)  # of what is resident, in a pass
    segments = []
    for part in cut.parts:
        layout = cut.layouts[part.name]
        if part.name in known.execute_s:
            execute_s = known.execute_s[part.name] / (2 if part.resident else 1)  # held between two visits
        elif known.call_s:
            execute_s = known.call_s.get(part.entry, 0.0) if part.entry else outside / max(1, visits)
            execute_s += VISIT_S
        else:
            execute_s = layout.bound_nbytes / COMPUTE_SPEED
        load_s = known.load_s.get(part.name, layout.read_nbytes / known.read_speed)
        segments.append(
            Segment(part.name, layout.nbytes, load_s, execute_s, layout.read_nbytes, part.resident)
        )
    made = Stage(facts.name, tuple(segments), facts.full_order, facts.passes, facts.pace)
    return _with_outside(made, known.execute_s.get(OUTSIDE, facts.between_s))


def _outside_s(facts: Facts) -> float:
    """Return what a forward computes that no streamed segment does."""
    call_s = facts.known.call_s
    if not call_s:
        return 0.0
    inside = sum(call_s.get(facts.cut.parts[i].entry or "", 0.0) for i in facts.order)
    return max(0.0, call_s.get("", 0.0) - inside)


def measured_costs(stage: Stage, index: int, ledger: Ledger) -> Stage:
    """Return the stage with the median load and execution times the ledger has of it.

    Segments of a size not seen yet take the speed of those that were. Time outside the segments goes to what
    is resident, else to all; what is resident is held through a pass, one span for its visits.
    """
    seen = Seen.of(ledger.spans, index, stage.pace)
    sized = {s.name: s for s in stage.segments}
    load_s = seen.load_s({s.name: (s.streamed_nbytes, s.nbytes) for s in stage.segments})
    read = sum(sized[n].streamed_nbytes * len(x) for n, x in seen.loads.items() if n in sized)
    spent = sum(map(sum, seen.loads.values()))
    speed = read / spent if spent > 0 and read else READ_SPEED
    measured = replace(
        stage,
        segments=tuple(
            replace(
                s,
                load_s=load_s.get(s.name, s.streamed_nbytes / speed),
                execute_s=median(seen.executes[s.name]) / (stage.order.count(i) if s.resident else 1)
                if seen.executes[s.name]
                else s.execute_s,
            )
            for i, s in enumerate(stage.segments)
        ),
    )
    return _with_outside(measured, seen.outside_s)


def _with_outside(stage: Stage, seconds: float) -> Stage:
    """Return the stage with time that belongs to no segment added to a pass."""
    if not seconds or not stage.order:
        return stage
    resident = {i for i in stage.visited if stage.segments[i].resident}
    takers = resident or set(stage.visited)
    more = seconds / sum(i in takers for i in stage.order)
    segments = tuple(
        replace(s, execute_s=s.execute_s + more) if i in takers else s for i, s in enumerate(stage.segments)
    )
    return replace(stage, segments=segments)


@dataclass
class Seen:
    """The seconds a ledger has of one stage, by segment; `outside_s` a pass, between its visits.

    Executions are those of an ordinary pass: what a pass of another pace took is divided by it.
    """

    loads: dict[str, list[float]]
    executes: dict[str, list[float]]
    outside_s: float

    @classmethod
    def of(cls, spans: Iterable[Span], index: int, pace: Sequence[float] = ()) -> Seen:
        """Read a stage's spans: its load, execute and stall spans carry their visit."""
        loads: dict[str, list[float]] = defaultdict(list)
        executes: dict[str, list[float]] = defaultdict(list)
        begin, end, busy, passes = float("inf"), 0.0, 0.0, set()
        for span in spans:
            if span.visit is None or span.visit.stage != index:
                continue
            if span.kind == "load":
                loads[span.label].append(span.seconds)
                continue
            if span.kind == "execute":
                n = span.visit.pass_index
                executes[span.label].append(span.seconds / (pace[n] if n < len(pace) else 1.0))
                passes.add(n)
            busy += span.seconds
            begin, end = min(begin, span.start_s), max(end, span.end_s)
        outside = max(0.0, end - begin - busy) / len(passes) if passes else 0.0
        return cls(loads, executes, outside)

    def load_s(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """Return what a load of each segment takes, where any of its size (bytes read, bytes held) was seen.

        It is the median of the segment's own loads, or, while they are less than `ENOUGH`, of all of its
        size: one slow read says nothing of the next.
        """
        alike: dict[tuple[int, int], list[float]] = defaultdict(list)
        for name, size in sizes.items():
            alike[size] += self.loads.get(name, ())
        found = {}
        for name, size in sizes.items():
            own = self.loads.get(name, [])
            if times := own if len(own) >= ENOUGH else alike[size]:
                found[name] = median(times)
        return found


def load_of(seen: Iterable[Seen]) -> float:
    """Return the part of the processors that other work took: how far visits are above the shortest.

    The first visit of a segment sets up what its kernels need, and does not count; 0 without others.
    """
    after = [times[1:] for one in seen for times in one.executes.values() if len(times) > 2]
    spent = sum(map(sum, after))
    quiet = sum(len(times) * sorted(times)[len(times) // 10] for times in after)
    return max(0.0, 1 - quiet / spent) if spent > 0 else 0.0
