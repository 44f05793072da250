"""The first plan of a session, from what was declared: nothing of a module is changed, nothing is kept."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockstream.budget.ceiling import Ceiling
from blockstream.errors import BudgetError
from blockstream.module.faking import Call
from blockstream.module.forked import may_fork
from blockstream.module.rehearsal import IMPORTS_NBYTES, needs_imports
from blockstream.plan.planner import Plan, least_arena, together
from blockstream.plan.segments import Schedule
from blockstream.system.runtime_floor import RUNTIME_MODULES, runtime_floor

from .asked import Asked
from .costs import default_costs
from .cuts import cut_apart, cut_to_fit, cut_to_gain
from .declared import Declared
from .op_costs import Measuring
from .remembered import known_costs
from .stage_facts import Facts

log = logging.getLogger(__name__)

#: Activations expected of a stage that nothing is known of.
ACTIVATIONS_NBYTES = 32 << 20
#: A budget this near the least asks for the runtime floor, which may have to be measured in a child.
TIGHT_NBYTES = 256 << 20
#: One this near the least has no room for what the heap keeps of freed activations.
FRUGAL_NBYTES = 128 << 20


@dataclass(frozen=True)
class First:
    """The first plan, and what it was made from.

    `room_nbytes`: the bytes that weights were planned for; `frugal`: that is near the least. `runtime_nbytes`
    and `activations_nbytes`: what is held beside weights, libraries warm, and expected.
    """

    plan: Plan
    facts: tuple[Facts, ...]
    room_nbytes: int
    frugal: bool
    runtime_nbytes: int
    activations_nbytes: int


def first_plan(
    stages: Sequence[Declared],
    ceiling: Ceiling,
    asked: Asked,
    variant: str = "",
    called: tuple[str, Call] | None = None,
) -> First:
    """Return the first plan; stages are cut finer where the arena asks for it, or time is gained.

    `called`: the stage whose forward is about to begin, and with what: the inputs of one that has no example
    inputs. Raises BudgetError, naming the least that would do, when nothing fits.
    """
    facts = [known_facts(stage, variant, asked.measuring) for stage in stages]
    facts = _apart(facts, stages, asked.room(ceiling.weights_nbytes(ceiling.outside_nbytes)))
    facts, runtime = _beside(stages, facts, ceiling, asked, variant, called)
    activations = expected_activations(facts)
    outside = runtime + activations
    room = asked.room(ceiling.weights_nbytes(outside))
    facts = _apart(facts, stages, room)
    shelves = sum(f.shelf_nbytes for f in facts)
    room, most = room - shelves, room
    for i, stage in enumerate(stages):
        facts[i] = cut_to_fit(facts[i], stage.prepared, room, asked.slots)
        if asked.slots is None and asked.lookahead is None:
            facts[i] = cut_to_gain(facts[i], stage.prepared, room, asked.policies)
    shelves = sum(f.shelf_nbytes for f in facts)  # heads that are read by rows included
    room = most - shelves
    schedule = Schedule.of([default_costs(f) for f in facts])
    least, frugal = least_arena(schedule, asked.slots), False
    if asked.arena_nbytes is None or least + shelves <= asked.arena_nbytes:
        largest = max((s for x in schedule.stages for s in x.segments), key=lambda s: s.nbytes)
        count = asked.slots or min(2, sum(not s.resident for x in schedule.stages for s in x.segments))
        ceiling.refuse(least + shelves, outside, (largest.name, largest.nbytes), count)
        room = max(room, least)
        frugal = room < least + FRUGAL_NBYTES
    elif shelves:
        raise BudgetError(
            f"an arena of {asked.arena_nbytes:,} bytes cannot hold two slots ({least:,} bytes) beside "
            f"{shelves:,} bytes for the experts that compute; the least is {least + shelves:,} bytes"
        )
    plan = asked.plan(schedule, room, ceiling.explicit)
    if len(stages) > 1 and plan.retains_all and all(s.passes.most is None for s in schedule.stages):
        plan = together(plan, room) or plan  # they may be called in turn, again and again
    return First(plan, tuple(facts), room, frugal, runtime, activations)


def _apart(facts: Sequence[Facts], stages: Sequence[Declared], room: int) -> list[Facts]:
    """Return the stages, those with no room for all of their experts with experts read one by one."""
    return [cut_apart(f, stage.prepared, room) for f, stage in zip(facts, stages, strict=True)]


def expected_activations(facts: Sequence[Facts]) -> int:
    """Return the most that any stage is expected to hold besides weights."""
    known = (f.activations_nbytes for f in facts)
    return max((ACTIVATIONS_NBYTES if n is None else n for n in known), default=0)


def floor_nbytes() -> int:
    """Return what a process with the modules of this one holds once they have computed."""
    loaded = [m for m in RUNTIME_MODULES if m in sys.modules]
    try:
        return runtime_floor(loaded).nbytes
    except BudgetError as error:
        log.warning("%s", error)
        return 0


def known_facts(stage: Declared, variant: str, measuring: Measuring) -> Facts:
    """Return what a stage's example inputs and earlier runs tell of it."""
    facts = Facts.of(stage)
    reasons: list[Exception] = []
    if stage.inputs is not None:
        began = time.perf_counter()
        facts = facts.rehearsed(stage.prepared, stage.inputs, reasons.append)
        measuring.rehearsed_s += time.perf_counter() - began
    known = known_costs(facts, variant, measuring)
    for error in reasons:
        why = f"its example inputs do not run ({f'{type(error).__name__}: {error}'.splitlines()[0][:200]})"
        known = replace(known, source=f"{known.source}; {why}")
        log.warning(
            "stage %r is planned by a guess until its first pass: %s; pass inputs of the shapes and dtypes "
            "of a call, or none",
            *(stage.name, why),
        )
    return replace(facts, known=known)


def _beside(
    stages: Sequence[Declared],
    facts: list[Facts],
    ceiling: Ceiling,
    asked: Asked,
    variant: str,
    called: tuple[str, Call] | None,
) -> tuple[list[Facts], int]:
    """Return the stages with what the first call shows, and what is held beside weights and activations.

    Where "auto" leaves room for all weights, what compute needs is not found out beforehand.
    """
    schedule = Schedule.of([default_costs(f) for f in facts])
    most = max(x.nbytes for x in schedule.stages)
    tight = ceiling.explicit or ceiling.weights_nbytes(ceiling.outside_nbytes + ACTIVATIONS_NBYTES) < most
    least = least_arena(schedule, asked.slots)
    spare = ceiling.weights_nbytes(ceiling.outside_nbytes + ACTIVATIONS_NBYTES) - least
    apart = needs_imports() and spare <= TIGHT_NBYTES + IMPORTS_NBYTES
    if called is not None and ceiling.explicit and (not apart or may_fork()):
        for i, (stage, known) in enumerate(zip(stages, facts, strict=True)):
            if stage.name == called[0] and stage.inputs is None:
                shown = known.rehearsed(stage.prepared, called[1], apart=apart)
                facts[i] = replace(shown, known=known_costs(shown, variant, asked.measuring))
    if tight and any(f.rehearsal is not None for f in facts):
        gc.collect()  # what a rehearsal left in cycles would be there in one start and not in another
        ceiling.relieve()
    runtime = ceiling.outside_nbytes  # what it took to find that out included
    activations = expected_activations(facts)
    if ceiling.explicit and ceiling.weights_nbytes(runtime + activations) < least + TIGHT_NBYTES:
        runtime = max(runtime, floor_nbytes())
    return facts, runtime
